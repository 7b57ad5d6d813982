"""A page from the places of its pieces: tables, columns, lines, paragraphs.

A piece is a part of a line that is set in one go: a cell, or the line of a column. Coordinates are points, y upwards.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from qlora.reading.section import PARAGRAPH, Block
from qlora.reading.table import as_rows

NEAR = 3.0  # points: lines that meet, edges that are one
HYPHENS = ("-", "\u00ad", "\u2010")
TOUCHING = 0.2  # of the height: narrower than a space
FEWEST = 4  # pieces on both sides of a gutter


@dataclass(frozen=True)
class Box:
    """A place on a page, with the text in it; of a drawn line without text."""

    left: float
    bottom: float
    right: float
    top: float
    text: str = ""

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    @property
    def height(self) -> float:
        return self.top - self.bottom


@dataclass(frozen=True)
class Paragraph:
    """Text of one paragraph, or the rows of a table, whose first names the columns."""

    text: str
    lines: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def blocks(self, page: int, join: str = PARAGRAPH) -> Iterator[Block]:
        if not self.rows:
            yield Block(self.text, page, join=join)
            return
        yield from as_rows(self.rows[0], [(page, cells) for cells in self.rows[1:]], header_number=page)


Line = list[Box]  # pieces side by side, from left to right


def lay_out(pieces: Sequence[Box], drawn: Sequence[Box]) -> list[Paragraph]:
    """The paragraphs and tables in the order in which a person reads them."""
    tables = [grid for grid in find_grids(drawn) if is_table(grid, pieces)]
    inside = {id(piece) for grid in tables for piece in pieces if grid.holds(piece)}
    left_over = [piece for piece in pieces if id(piece) not in inside]
    made: list[Paragraph] = []
    waiting = sorted(tables, key=lambda grid: -grid.top)
    for column in split_columns(left_over):
        lines = as_lines(column)
        edge = max((line[-1].right for line in lines), default=0.0)
        while waiting and lines and (at := first_below(lines, waiting[0])) is not None:
            made += [*as_paragraphs(lines[:at], edge), waiting.pop(0).read(pieces)]
            lines = lines[at:]
        made += as_paragraphs(lines, edge)
    return made + [grid.read(pieces) for grid in waiting]


def first_below(lines: list[Line], grid: "Grid") -> int | None:
    """The first line below the top of the table, if the table is in this column."""
    beside = any(line[0].left < grid.right and line[-1].right > grid.left for line in lines)
    return next((n for n, line in enumerate(lines) if line[0].top < grid.top), None) if beside else None


# ------------------------------------------------------------------------------- columns and lines


def split_columns(pieces: Sequence[Box]) -> Iterator[list[Box]]:
    """The pieces in reading order: as the file has them, unless they run across two columns.

    Pieces that cross the gutter divide the page into bands; in each the left column comes first.
    """
    gutter = find_gutter(pieces)
    if gutter is None:
        yield list(pieces)
        return
    band: list[Box] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.middle[1], piece.left)):
        if piece.left < gutter < piece.right:
            yield from halves(band, gutter)
            band = []
            yield [piece]
        else:
            band.append(piece)
    yield from halves(band, gutter)


def halves(band: list[Box], gutter: float) -> Iterator[list[Box]]:
    for half in ([p for p in band if p.right <= gutter], [p for p in band if p.left >= gutter]):
        if half:
            yield half


def find_gutter(pieces: Sequence[Box]) -> float | None:
    """Where a white strip divides most lines of the page into two columns of prose, if one does."""
    if len(pieces) < 2 * FEWEST:
        return None
    edges = sorted({round(piece.right) + 1 for piece in pieces})
    best, found = 0, None
    for edge in edges:
        left = [piece for piece in pieces if piece.right <= edge]
        right = [piece for piece in pieces if piece.left >= edge]
        crossing = len(pieces) - len(left) - len(right)
        score = min(len(left), len(right)) - 2 * crossing
        if score > best and min(len(left), len(right)) >= FEWEST and are_prose(left) and are_prose(right):
            best, found = score, float(edge)
    return found


def are_prose(pieces: list[Box]) -> bool:
    """Whether lines of several words fill a column, as cells of a table do not."""
    return median(len(piece.text.split()) for piece in pieces) >= 4


def join_touching(pieces: Iterable[Box]) -> Iterator[Box]:
    """The pieces with text, those that touch as one: a ligature is set by itself."""
    last: Box | None = None
    for piece in pieces:
        if last and beside(last, piece) and abs(piece.left - last.right) < TOUCHING * max(piece.height, last.height):
            bottom, top = min(last.bottom, piece.bottom), max(last.top, piece.top)
            last = Box(last.left, bottom, piece.right, top, last.text + piece.text)
            continue
        if last and last.text.strip():
            yield last
        last = piece
    if last and last.text.strip():
        yield last


def as_lines(pieces: Sequence[Box]) -> list[Line]:
    """Neighbours in the order of the file that stand side by side make a line."""
    lines: list[Line] = []
    for piece in pieces:
        if lines and beside(lines[-1][-1], piece):
            lines[-1].append(piece)
        else:
            lines.append([piece])
    return merge_far(lines)


def beside(one: Box, other: Box) -> bool:
    """Whether two pieces stand on one line: the middle of each is within the other's height."""
    return one.bottom < other.middle[1] < one.top and other.bottom < one.middle[1] < other.top


def merge_far(lines: list[Line]) -> list[Line]:
    """Joins pieces of one line that are far apart in the file, such as a form's values; left to right."""
    kept: list[Line] = []
    for line in lines:
        found = next((other for other in kept if all(beside(piece, line[0]) for piece in other)), None)
        if found and not overlap(found, line):
            found.extend(line)
        else:
            kept.append(line)
    return [sorted(line, key=lambda piece: piece.left) for line in kept]


def overlap(one: Line, other: Line) -> bool:
    return any(a.left < b.right and b.left < a.right for a in one for b in other)


# ------------------------------------------------------------------------------- paragraphs


def as_paragraphs(lines: list[Line], edge: float) -> list[Paragraph]:
    """Runs of lines. A new one begins after a gap, a change of size, a line that ends early, and one in parts."""
    made: list[Paragraph] = []
    texts: list[str] = []
    pitch = usual_pitch(lines)
    rest = list(lines)
    while rest:
        if rows := aligned_rows(rest):
            made += [finish(texts)] if texts else []
            texts = []
            made.append(Paragraph("", rows=align(rest[:rows])))
            rest = rest[rows:]
            continue
        line = rest.pop(0)
        texts.append(" ".join(" ".join(piece.text for piece in line).split()))
        if not rest or ends_paragraph(line, rest[0], pitch, edge):
            made.append(finish(texts))
            texts = []
    return made


def usual_pitch(lines: list[Line]) -> float:
    """The distance of two lines, as most have it."""
    steps = [above[0].bottom - below[0].bottom for above, below in pairwise(lines)]
    return median([step for step in steps if step > 0] or [0.0])


def ends_paragraph(line: Line, below: Line, pitch: float, edge: float) -> bool:
    step = line[0].bottom - below[0].bottom
    sizes = sorted((line[0].height, below[0].height))
    width = edge - line[0].left
    is_short = line[-1].right < edge - 0.25 * width
    is_apart = step <= 0 or step > 1.4 * pitch + 1 or sizes[1] > 1.35 * sizes[0] + 1
    return is_apart or len(line) > 1 or (is_short and not goes_on(line, below))


def goes_on(line: Line, below: Line) -> bool:
    return below[0].text[:1].islower() and not line[-1].text.endswith((".", "!", "?", ":"))


def finish(texts: list[str]) -> Paragraph:
    """The lines as one text; a word that is broken at the end of a line is whole again."""
    text = texts[0]
    for line in texts[1:]:
        text = text[:-1] + line if is_broken(text, line) else f"{text} {line}"
    return Paragraph(text, len(texts))


def is_broken(text: str, line: str) -> bool:
    """Whether a hyphen divides a word that goes on in this line."""
    return text[-1:] in HYPHENS and text[-2:-1].isalpha() and line[:1].islower()


# ------------------------------------------------------------------------------- tables without lines


def aligned_rows(lines: list[Line]) -> int:
    """How many of the next lines are rows of a table: three or more, of cells below those of the first.

    The first names three columns or more. 0 without one.
    """
    if len(lines) < 3 or len(lines[0]) < 3:
        return 0
    count = 1
    while count < len(lines) and fits(lines[0], lines[count]):
        count += 1
    return count if count >= 3 else 0


def fits(header: Line, line: Line) -> bool:
    """Whether each piece stands under one name, two or more of them side by side."""
    if len(line) < 2 or len(line) > len(header):
        return False
    columns = [column_of(header, piece) for piece in line]
    return len(set(columns)) == len(columns)


def column_of(header: Line, piece: Box) -> int:
    """The name that the piece stands below, or is nearest to."""

    def distance(name: Box) -> float:
        apart = max(name.left - piece.right, piece.left - name.right)
        return apart if apart > 0 else min(abs(name.left - piece.left), abs(name.right - piece.right)) / 1000

    return min(range(len(header)), key=lambda n: distance(header[n]))


def align(lines: list[Line]) -> list[list[str]]:
    """The rows, with an empty cell where nothing stands."""
    rows = []
    for line in lines:
        cells = [""] * len(lines[0])
        for piece in line:
            cells[column_of(lines[0], piece)] = " ".join(piece.text.split())
        rows.append(cells)
    return rows


# ------------------------------------------------------------------------------- tables between lines


@dataclass(frozen=True)
class Grid:
    """Lines that cross: the places of its columns and rows, and where lines are drawn between cells."""

    across: list[float]  # x of the vertical lines, from left to right
    down: list[float]  # y of the horizontal lines, from the top
    drawn: list[Box]

    @property
    def left(self) -> float:
        return self.across[0]

    @property
    def right(self) -> float:
        return self.across[-1]

    @property
    def top(self) -> float:
        return self.down[0]

    def holds(self, piece: Box) -> bool:
        x, y = piece.middle
        return self.left < x < self.right and self.down[-1] < y < self.top

    def read(self, pieces: Sequence[Box]) -> Paragraph:
        """The cells' texts; a cell that covers several places is repeated in each."""
        rows, columns = len(self.down) - 1, len(self.across) - 1
        own: dict[tuple[int, int], list[Box]] = {}
        for piece in pieces:
            if self.holds(piece):
                own.setdefault(self.merged(*self.cell_of(piece)), []).append(piece)
        texts = {cell: join_cell(boxes) for cell, boxes in own.items()}
        return Paragraph("", rows=[[texts.get(self.merged(r, c), "") for c in range(columns)] for r in range(rows)])

    def cell_of(self, piece: Box) -> tuple[int, int]:
        x, y = piece.left + min(NEAR, (piece.right - piece.left) / 2), piece.middle[1]
        row = sum(edge > y for edge in self.down) - 1
        column = sum(edge < x for edge in self.across) - 1
        return min(max(row, 0), len(self.down) - 2), min(max(column, 0), len(self.across) - 2)

    def merged(self, row: int, column: int) -> tuple[int, int]:
        """The first cell, up and to the left, of those that no line divides from this one."""
        while column and not self.divides(self.across[column], self.row_middle(row), vertical=True):
            column -= 1
        while row and not self.divides(self.down[row], self.column_middle(column), vertical=False):
            row -= 1
        return row, column

    def row_middle(self, row: int) -> float:
        return (self.down[row] + self.down[row + 1]) / 2

    def column_middle(self, column: int) -> float:
        return (self.across[column] + self.across[column + 1]) / 2

    def divides(self, at: float, middle: float, vertical: bool) -> bool:
        """Whether a line is drawn at this x (or y) beside this middle of a row (or column)."""
        if vertical:
            return any(is_vertical(d) and abs(d.left - at) <= NEAR and d.bottom <= middle <= d.top for d in self.drawn)
        return any(not is_vertical(d) and abs(d.top - at) <= NEAR and d.left <= middle <= d.right for d in self.drawn)


def join_cell(boxes: list[Box]) -> str:
    """The text of a cell of several lines."""
    ordered = sorted(boxes, key=lambda box: (-round(box.middle[1] / NEAR), box.left))
    return finish([" ".join(box.text.split()) for box in ordered]).text


def is_vertical(line: Box) -> bool:
    return line.right - line.left < line.height


def find_grids(drawn: Sequence[Box]) -> list[Grid]:
    """The groups of straight lines that touch, as far as they have two columns and two rows."""
    straight = [line for line in drawn if min(line.right - line.left, line.height) < NEAR]
    straight = [line for line in straight if max(line.right - line.left, line.height) > 2 * NEAR]
    grids = []
    for group in touching(list(dict.fromkeys(straight))[:3000]):
        across = cluster([line.left for line in group if is_vertical(line)])
        down = cluster([line.top for line in group if not is_vertical(line)])[::-1]
        if len(across) > 2 and len(down) > 2:
            grids.append(Grid(across, down, group))
    return grids


def touching(lines: list[Box]) -> list[list[Box]]:
    groups: list[list[Box]] = []
    for line in lines:
        joined = [group for group in groups if any(touch(line, other) for other in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([line, *(other for group in joined for other in group)])
    return groups


def touch(one: Box, other: Box) -> bool:
    return (
        one.left <= other.right + NEAR
        and other.left <= one.right + NEAR
        and one.bottom <= other.top + NEAR
        and other.bottom <= one.top + NEAR
    )


def cluster(values: list[float]) -> list[float]:
    """The values in order, those that are near each other once."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > NEAR:
            kept.append(value)
    return kept


def is_table(grid: Grid, pieces: Sequence[Box]) -> bool:
    """Whether a third of its cells hold text: a drawing is none."""
    cells = {grid.merged(*grid.cell_of(piece)) for piece in pieces if grid.holds(piece)}
    return 3 * len(cells) >= (len(grid.across) - 1) * (len(grid.down) - 1)
