"""What is read of PDF files: order, broken words, headers, forms, passwords, scans."""

import io

import pytest
from test_documents import load, make_pdf, tokenizer  # noqa: F401
from test_formats import read, texts

from qlora.console import UserError
from qlora.reading import kinds, pdf
from qlora.reading.kinds import read_sections
from qlora.reading.section import Note, find_number


def place_texts(path, *pages, rotate=0):
    """Pages with texts at their places: (x, y, text), in points."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with rc_context({"pdf.fonttype": 42}), PdfPages(path) as out:
        for page in pages:
            figure = Figure(figsize=(595 / 72, 842 / 72))
            for x, y, text in page:
                figure.text(x / 595, y / 842, text, fontsize=9)
            out.savefig(figure)
    if rotate:  # stored on its side, and shown upright
        from pypdf import PdfReader, PdfWriter, Transformation
        from pypdf.generic import RectangleObject

        writer = PdfWriter(clone_from=PdfReader(path))
        for page in writer.pages:
            width, height = page.mediabox.width, page.mediabox.height
            shift = {90: (height, 0), 180: (width, height), 270: (0, width)}[rotate]
            page.add_transformation(Transformation().rotate(rotate).translate(*shift))
            page.mediabox = RectangleObject((0, 0, *((width, height) if rotate == 180 else (height, width))))
            page.cropbox = page.mediabox
            page.rotate(rotate)
        writer.write(path)


LEFT = [
    "the ferry sails at six and takes the mail",
    "to the outer islands on every weekday but",
    "not on days of gale or fog when it stays",
    "in port until the duty officer clears it",
]
RIGHT = [
    "a vessel of less than nine metres may use",
    "the inner lock at any hour of the night if",
    "its crew works the gate by hand and leaves",
    "the key with the keeper in the morning",
]


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_two_columns_are_read_one_after_the_other(tmp_path, rotate):
    rows = list(zip(LEFT, RIGHT, strict=True))
    page = [(60, 780, "A heading that goes across both of the columns of the page")]
    for n, (left, right) in enumerate(rows):  # line by line across the page, as some programs write
        page += [(60, 740 - 12 * n, left), (320, 740 - 12 * n, right)]
    place_texts(tmp_path / "a.pdf", page, rotate=rotate)
    text = " ".join(read(tmp_path / "a.pdf")[0].text.split())
    assert " ".join(LEFT) in text and " ".join(RIGHT) in text
    assert text.startswith("A heading") and text.index("ferry") < text.index("vessel")


def test_a_page_that_is_shown_on_its_side_is_read(tmp_path):
    from pypdf import PdfReader, PdfWriter

    place_texts(tmp_path / "a.pdf", [(60, 700, "The first line of the page."), (60, 600, "The second line of it.")])
    writer = PdfWriter()
    writer.add_page(PdfReader(tmp_path / "a.pdf").pages[0].rotate(90))
    writer.write(tmp_path / "a.pdf")
    assert read(tmp_path / "a.pdf")[0].text == "The first line of the page.\n\nThe second line of it."


def test_a_sentence_goes_on_over_the_page_and_a_broken_word_is_whole(tmp_path, tokenizer):  # noqa: F811
    first = [(60, 700, "Every crane is inspected in March, and each hoist needs a recerti-")]
    second = [(60, 780, "fication by the harbour engineer before the season begins in May.")]
    place_texts(tmp_path / "a.pdf", first, second)
    (passage,) = load(tmp_path / "a.pdf", tokenizer)
    assert "needs a recertification by the harbour" in passage.page_content
    assert (passage.metadata["page"], passage.metadata["last_page"]) == (1, 2)


def test_headers_footers_and_page_numbers_are_left_out(tmp_path):
    facts = [
        "The north gate opens at six.",
        "The south gate opens at seven.",
        "The west gate stays shut.",
        "No gate east.",
    ]
    pages = [
        [(60, 800, "Harbour manual, edition 3"), (60, 500, fact), (280, 40, f"Page {n} of 4")]
        for n, fact in enumerate(facts, 1)
    ]
    place_texts(tmp_path / "a.pdf", *pages)
    sections = read(tmp_path / "a.pdf")
    whole = "\n".join(section.text for section in sections)
    assert whole.count("Harbour manual") == 1 and "Page" not in whole and all(fact in whole for fact in facts)
    assert [find_number(section, 0) for section in sections] == [1, 2, 3, 4]


def test_pages_without_text_are_named(tmp_path):
    place_texts(tmp_path / "a.pdf", [(60, 700, "First.")], [], [], [(60, 700, "Last.")], [])
    notes = [part for part in read_sections(tmp_path / "a.pdf") if isinstance(part, Note)]
    assert [note.text for note in notes] == ["pages 2-3, 5 of 5 have no text"]


def test_an_encrypted_file_is_read_unless_it_needs_a_password(tmp_path):
    from pypdf import PdfReader, PdfWriter

    make_pdf(tmp_path / "plain.pdf", "The key is brass.")
    for name, password in (("free.pdf", ""), ("shut.pdf", "secret")):
        writer = PdfWriter(clone_from=PdfReader(tmp_path / "plain.pdf"))
        writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    assert texts(tmp_path / "free.pdf")[0][1] == "The key is brass."
    with pytest.raises(UserError, match="needs a password"):
        read(tmp_path / "shut.pdf")


def test_filled_fields_stand_beside_their_labels(tmp_path):
    from pypdf import PdfReader, PdfWriter
    from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, TextStringObject

    place_texts(tmp_path / "plain.pdf", [(60, 700, "Name of vessel:"), (60, 660, "Shore power:")])
    writer = PdfWriter(clone_from=PdfReader(tmp_path / "plain.pdf"))
    scale = float(writer.pages[0].mediabox.width) / 595
    fields = ArrayObject()
    for name, value, y in (("vessel", "Kittiwake", 697), ("power", "Yes", 657)):
        box = ArrayObject(FloatObject(number * scale) for number in (200, y, 300, y + 14))
        field = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Annot"),
                NameObject("/Subtype"): NameObject("/Widget"),
                NameObject("/FT"): NameObject("/Tx"),
                NameObject("/T"): TextStringObject(name),
                NameObject("/V"): TextStringObject(value),
                NameObject("/Rect"): box,
            }
        )
        fields.append(writer._add_object(field))
    writer.pages[0][NameObject("/Annots")] = fields
    form = DictionaryObject({NameObject("/Fields"): fields})
    writer._root_object[NameObject("/AcroForm")] = writer._add_object(form)
    writer.write(tmp_path / "a.pdf")
    assert read(tmp_path / "a.pdf")[0].text.split("\n\n") == ["Name of vessel: Kittiwake", "Shore power: Yes"]


@pytest.mark.skipif(not pdf.tesseract_languages(), reason="Tesseract is not installed")
def test_scanned_pages_are_read_by_tesseract(tmp_path):
    place_texts(tmp_path / "text.pdf", [(60, 700, "The brass key hangs in room fourteen.")])
    with pdf.open_pdf(tmp_path / "text.pdf") as document:
        picture = pdf.draw_page(document, 0)
    from PIL import Image

    Image.open(io.BytesIO(picture)).save(tmp_path / "scan.pdf", resolution=300)
    assert read(tmp_path / "scan.pdf") == []
    assert "brass key hangs in room fourteen" in read(tmp_path / "scan.pdf", ocr="eng")[0].text


def test_ocr_takes_languages_that_are_installed(monkeypatch):
    monkeypatch.setattr(pdf, "tesseract_languages", lambda: ("deu", "eng"))
    assert [kinds.choose_ocr(asked) for asked in ("off", "auto", "deu+eng")] == ["", "eng", "deu+eng"]
    with pytest.raises(UserError, match="no language fra - --ocr - install tesseract-ocr-fra"):
        kinds.choose_ocr("fra")
    monkeypatch.setattr(pdf, "tesseract_languages", tuple)
    assert kinds.choose_ocr("auto") == ""
    with pytest.raises(UserError, match="Tesseract is not installed"):
        kinds.choose_ocr("deu")
