"""PowerPoint files: a slide's title is its heading; tables, groups and the speaker's notes are read."""

from collections.abc import Iterator
from pathlib import Path

from qlora.reading.section import Block, Section, sections
from qlora.reading.table import as_rows


def read_pptx(file: Path) -> Iterator[Section]:
    """A section per slide."""
    from pptx import Presentation

    return sections(slide_blocks(Presentation(str(file))), "slide")


def slide_blocks(presentation) -> Iterator[Block]:
    """Title, shapes and notes of every slide."""
    for number, slide in enumerate(presentation.slides, 1):
        title = slide.shapes.title
        if title is not None and title.text_frame.text.strip():
            yield Block(" ".join(title.text_frame.text.split()), number, level=1)
        for shape in slide.shapes:
            if title is None or shape.shape_id != title.shape_id:
                yield from shape_blocks(shape, number)
        if slide.has_notes_slide and (notes := slide.notes_slide.notes_text_frame) and notes.text.strip():
            yield Block(notes.text.strip(), number)


def shape_blocks(shape, number: int) -> Iterator[Block]:
    """The rows of a table, the parts of a group, or the text."""
    if hasattr(shape, "shapes"):  # a group
        for part in shape.shapes:
            yield from shape_blocks(part, number)
    elif getattr(shape, "has_table", False):
        rows = [[cell_text(cell) for cell in row.cells] for row in shape.table.rows]
        fill_merged(shape.table, rows)
        yield from as_rows(rows[0], [(number, cells) for cells in rows[1:]], header_number=number)
    elif shape.has_text_frame:
        lines = (" ".join(paragraph.text.split()) for paragraph in shape.text_frame.paragraphs)
        if text := "\n".join(filter(None, lines)):
            yield Block(text, number)


def cell_text(cell) -> str:
    return " ".join(cell.text.split())


def fill_merged(table, rows: list[list[str]]) -> None:
    """Repeats a merged cell in every place that it covers."""
    for top, row in enumerate(table.rows):
        for left, cell in enumerate(row.cells):
            if cell.is_merge_origin:
                for covered in rows[top : top + cell.span_height]:
                    covered[left : left + cell.span_width] = [rows[top][left]] * cell.span_width
