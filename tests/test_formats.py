"""What is read of each kind of file: structure, tables, encodings; and what is left out and said."""

import zipfile
from email.message import EmailMessage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_documents import load, tokenizer  # noqa: F401

from qlora.console import UserError
from qlora.reading.kinds import read_sections
from qlora.reading.section import Section, find_number
from qlora.retrieval.passages import Splitting


def read(path, content=None, ocr="") -> list[Section]:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [part for part in read_sections(path, ocr) if isinstance(part, Section)]


def texts(path, content=None) -> list[tuple[str, str]]:
    return [(section.heading, section.text) for section in read(path, content)]


# ------------------------------------------------------------------------------- every line arrives


def test_lines_with_a_number_sign_are_text_but_for_markdown(tmp_path):
    lines = "# Close valve A first.\n\n## gate code 4411\nstart = true\n"
    assert texts(tmp_path / "a.txt", lines) == [("", lines)]
    assert texts(tmp_path / "a.csv", 'berth,note\nN1,"first\n# gate code 4411"\n') == [
        ("", "berth: N1 / note: first\n# gate code 4411")
    ]


def test_a_heading_without_text_is_text(tmp_path):
    markdown = "# Contacts\n\n## Fax: 555 0199\n\n## Duty officer: Ada\n\n## Hours\n\nNine to five.\n\n## Key\n"
    found = texts(tmp_path / "a.md", markdown)
    assert found[0] == ("Contacts", "Fax: 555 0199\nDuty officer: Ada")
    assert found[1][0] == "Contacts > Hours" and found[2] == ("Contacts", "Key")


WORDS = st.lists(st.sampled_from(["anchor", "berth", "crane", "dock", "eel"]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["p", "li", "h2", "h3", "row", "pre"]), WORDS), min_size=1, max_size=12))
def test_every_word_of_a_page_arrives_once_and_in_order(tmp_path_factory, tokenizer, parts):  # noqa: F811
    """Numbered words: each must be in the passages (or the heading path) of the place where it stands."""
    folder = tmp_path_factory.mktemp("words")
    number, html, markdown, expected = 0, [], [], []
    for tag, words in parts:
        named = []
        for word in words[: 8 if tag.startswith("h") else 60]:
            number += 1
            named.append(f"{word}{number}")
        expected += named
        text = " ".join(named)
        html.append(f"<table><tr><td>{text}</td></tr></table>" if tag == "row" else f"<{tag}>{text}</{tag}>")
        start = {"h2": "## ", "h3": "### ", "li": "- ", "pre": "    "}.get(tag, "")
        markdown.append(f"|a|\n|-|\n|{text}|" if tag == "row" else start + text)
    (folder / "a.html").write_text("<body>" + "\n".join(html), encoding="utf-8")
    (folder / "a.md").write_text("\n\n".join(markdown), encoding="utf-8")
    (folder / "a.txt").write_text("\n\n".join(markdown), encoding="utf-8")
    for name in ("a.html", "a.md", "a.txt"):
        passages = load(folder / name, tokenizer)
        there = set(
            " ".join(f"{p.metadata.get('heading', '')} {p.page_content}" for p in passages).replace("|", " ").split()
        )
        assert not set(expected) - there, name
        own = [[word for word in expected if word in p.page_content.split()] for p in passages]
        assert all(list(map(expected.index, row)) == sorted(map(expected.index, row)) for row in own), name


# ------------------------------------------------------------------------------- encodings

GERMAN, POLISH = "Die Liegegebühr für Gäste beträgt 12 € \u2013 ohne Frühstück.", "Opłata za postój łodzi wynosi złoty."
RUSSIAN, JAPANESE = "Ключ от склада лежит под синим якорем.", "桟橋の料金は一泊千二百円です。鍵は青い箱の中にあります。"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "cp1252"),
        (GERMAN, "utf-8-sig"),
        (GERMAN, "utf-16"),
        (GERMAN, "utf-32"),
        (GERMAN.replace("€", "E").replace("\u2013", "-"), "latin-1"),
        (POLISH, "cp1250"),
        (POLISH, "iso8859-2"),
        (RUSSIAN, "koi8-r"),
        (RUSSIAN, "cp1251"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc-jp"),
        (RUSSIAN, "utf-16-be"),
        ("The fee is 12 € a night \u2013 “no breakfast”.", "cp1252"),
    ],
)
def test_short_texts_are_read_in_their_encoding(tmp_path, text, encoding):
    assert texts(tmp_path / "a.txt", text.encode(encoding)) == [("", text)]
    assert texts(tmp_path / "a.csv", f"note\n{text}\n".encode(encoding)) == [("", f"note: {text}")]


def test_one_odd_byte_late_in_a_large_file_decides_its_encoding(tmp_path):
    (found,) = texts(tmp_path / "a.txt", b"plain words\n" * 30_000 + "Gebühr 12 €".encode("cp1252"))
    assert found[1].endswith("Gebühr 12 €")


@pytest.mark.parametrize(
    "content",
    [
        f'<meta charset="windows-1252"><p>{GERMAN}'.encode("cp1252"),
        f'<meta charset="iso-8859-1"><p>{GERMAN}'.encode("cp1252"),  # a browser reads Windows-1252
        f'<meta http-equiv="Content-Type" content="text/html; charset=utf-8"><p>{GERMAN}'.encode(),
        f'<meta charset="koi8-r"><p>{GERMAN}'.encode("utf-16"),  # the byte order mark comes first
        f"<p>{GERMAN}".encode(),
    ],
)
def test_pages_are_read_in_the_encoding_that_browsers_take(tmp_path, content):
    assert texts(tmp_path / "a.html", content)[0][1] == GERMAN


# ------------------------------------------------------------------------------- tables

TABLE = [["Berth", "Fee", "Power"], ["N1", "", "16 A"], ["N2", "16 EUR", ""], ["N3", "19 EUR", "32 A"]]
ROWS = "Berth: N1 / Fee: / Power: 16 A\nBerth: N2 / Fee: 16 EUR / Power:\nBerth: N3 / Fee: 19 EUR / Power: 32 A"


def as_docx(path):
    import docx

    document = docx.Document()
    table = document.add_table(4, 3)
    for row, cells in zip(table.rows, TABLE, strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    document.save(path)


def as_pptx(path):
    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[6])
    table = slide.shapes.add_table(4, 3, 0, 0, Inches(6), Inches(3)).table
    for r, cells in enumerate(TABLE):
        for c, text in enumerate(cells):
            table.cell(r, c).text = text
    deck.save(path)


def draw_table(path, lines=True):
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6, 4))
    figure.text(0.1, 0.9, "Before the table there is a sentence that ends here.", fontsize=9)
    for r, cells in enumerate(TABLE):
        for c, text in enumerate(cells):
            figure.text(0.12 + 0.2 * c, 0.72 - 0.1 * r, text, fontsize=9)
    if lines:
        for n in range(5):
            figure.add_artist(Line2D([0.1, 0.7], [0.79 - 0.1 * n] * 2, color="black"))
        for n in range(4):
            figure.add_artist(Line2D([0.1 + 0.2 * n] * 2, [0.39, 0.79], color="black"))
    figure.text(0.1, 0.2, "After the table there is another sentence.", fontsize=9)
    FigureCanvasPdf(figure).print_figure(path)


def as_html(path):
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in TABLE)
    path.write_text(f"<table>{rows}</table>")


def as_markdown(path):
    lines = ["|" + "|".join(cells) + "|" for cells in TABLE]
    path.write_text("\n".join([lines[0], "|---|---|---|", *lines[1:]]))


def as_rst(path):
    border = "+".join(["", *["-" * 10] * 3, ""])
    lines = [border]
    for cells in TABLE:
        lines += ["|" + "|".join(cell.ljust(10) for cell in cells) + "|", border]
    lines[2] = border.replace("-", "=")
    path.write_text("Fees\n====\n\n" + "\n".join(lines) + "\n\nText below.\n")


def as_csv(path):
    path.write_text("\n".join(";".join(cells) for cells in TABLE))


def as_sheet(path):
    make_xlsx(path, TABLE)


def make_xlsx(path, rows, merged=""):
    import xlsxwriter

    with xlsxwriter.Workbook(path) as book:
        sheet = book.add_worksheet("Fees")
        for number, row in enumerate(rows):
            sheet.write_row(number, 0, row)
        if merged:
            sheet.merge_range(merged, "N1")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.md", as_markdown),
        ("a.html", as_html),
        ("a.rst", as_rst),
        ("a.docx", as_docx),
        ("a.pptx", as_pptx),
        ("a.pdf", draw_table),
        ("b.pdf", lambda path: draw_table(path, lines=False)),
        ("a.csv", as_csv),
        ("a.xlsx", as_sheet),
    ],
)
def test_a_row_stays_a_row_and_an_empty_cell_empty(tmp_path, name, make):
    make(tmp_path / name)
    whole = "\n".join(section.text for section in read(tmp_path / name))
    assert ROWS in whole
    if name.endswith("pdf"):
        assert whole.startswith("Before the table") and whole.endswith("another sentence.")


def test_every_passage_of_a_split_table_has_the_names_of_the_columns(tmp_path, tokenizer):  # noqa: F811
    rows = "\n".join(f"| N{n} | {n} EUR | {n + 10} EUR |" for n in range(60))
    (tmp_path / "a.md").write_text(f"# Fees\n\n| Berth | Winter | Summer |\n|---|---|---|\n{rows}\n")
    passages = load(tmp_path / "a.md", tokenizer)
    lines = [line for passage in passages for line in passage.page_content.split("\n")]
    assert len(passages) > 3 and set(lines) == {
        f"Berth: N{n} / Winter: {n} EUR / Summer: {n + 10} EUR" for n in range(60)
    }
    assert passages[0].metadata["line"] == 5 and passages[0].metadata["heading"] == "Fees"


def test_a_long_cell_says_which_row_it_is_in(tmp_path, tokenizer):  # noqa: F811
    note = " ".join(f"The winch number {n} is greased." for n in range(150))
    (tmp_path / "a.csv").write_text(f'berth,note\nN1,"{note}"\nN2,short\n')
    passages = [passage for passage in load(tmp_path / "a.csv", tokenizer) if passage.metadata["row"] == 1]
    assert len(passages) > 3 and all(passage.page_content.startswith("berth: N1 / ") for passage in passages)
    assert all(len(tokenizer(passage.page_content).input_ids) <= 202 for passage in passages)


def test_a_long_first_cell_leaves_room_for_the_rest_in_small_passages(tmp_path, tokenizer):  # noqa: F811
    name = "the northern winch of the second quay beside the old customs house and its yard"
    (tmp_path / "a.csv").write_text(f"place,note\n{name},{' '.join(f'word{n}' for n in range(60))}\n")
    passages = load(tmp_path / "a.csv", tokenizer, Splitting("fake", 256, 16, 4))
    assert all(len(tokenizer(passage.page_content).input_ids) <= 18 for passage in passages)
    assert "word59" in passages[-1].page_content and passages[-1].page_content.startswith("place: the north")


def test_merged_cells_are_repeated(tmp_path):
    html = (
        "<table><thead><tr><th rowspan=2>Berth<th colspan=2>Fee</tr><tr><th>Winter<th>Summer</tr></thead>"
        "<tr><td rowspan=2>N1<td>1<td>2</tr><tr><td>3<td>4</tr><tr><td colspan=3>Closed in May</tr></table>"
    )
    assert texts(tmp_path / "a.html", html)[0][1].split("\n") == [
        "Berth: N1 / Fee Winter: 1 / Fee Summer: 2",
        "Berth: N1 / Fee Winter: 3 / Fee Summer: 4",
        "Closed in May",
    ]
    make_xlsx(tmp_path / "a.xlsx", [["Berth fees 2026"], ["Berth", "Fee"], ["N1", 12.5], ["", 13], ["N3", 14]], "A3:A4")
    assert texts(tmp_path / "a.xlsx") == [
        ("Fees", "Berth fees 2026"),
        ("Fees", "Berth: N1 / Fee: 12.5"),
        ("Fees", "Berth: N1 / Fee: 13"),
        ("Fees", "Berth: N3 / Fee: 14"),
    ]


def test_a_form_of_two_columns_is_read_line_by_line(tmp_path):
    html = "<table><tr><th>Vessel</th><td>Kittiwake</td></tr><tr><th>Draught</th><td>2.35</td></tr></table>"
    assert texts(tmp_path / "a.html", html)[0][1] == "Vessel: Kittiwake\nDraught: 2.35"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_and_ragged_rows_lose_nothing(tmp_path, delimiter):
    rows = [["berth", "fee", ""], ["N1", "13.50 EUR", "by the crane", "new"], ["N2"], [], ["N3", "19 EUR"]]
    content = "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows)
    sections = read(tmp_path / "a.csv", content)
    assert [section.text for section in sections] == [
        "berth: N1 / fee: 13.50 EUR / by the crane / new",
        "berth: N2 / fee:",
        "berth: N3 / fee: 19 EUR",
    ]
    assert [find_number(section, 0) for section in sections] == [1, 2, 4]


def test_json_has_words_instead_of_python(tmp_path):
    content = (
        '{"port": "Tarn", "open": {"mon": true, "sun": null}, "tags": ["a", "b"], "berths": [{"id": 1.50}, {"id": 2}]}'
    )
    assert texts(tmp_path / "a.json", content) == [
        ("", "port: Tarn / open mon: true / tags: a, b"),
        ("berths", "id: 1.50"),
        ("berths", "id: 2"),
    ]


# ------------------------------------------------------------------------------- HTML

PAGE = """<!doctype html><html><head><title>Guide - Port</title><style>p {}</style></head><body>
<nav>Home</nav><header><h1>Guide</h1></header>
<p>The <b>Kitti</b>wake is<br>fast.<!-- not this --> Always.</p>
<div style="display: none">hidden</div><p hidden>hidden</p><script>hidden()</script>
<ol start="3"><li>Open<li>Prime<ul><li>gently</ul><li value="9"><p>Press</p></ol>
<h2>Sub</h2>
<pre>a
  b</pre>
<footer>Copyright</footer></body></html>"""


def test_a_page_is_read_as_a_browser_shows_it(tmp_path):
    first, second = read(tmp_path / "a.html", PAGE)
    assert first.heading == "Guide" and second.heading == "Guide > Sub"
    assert first.text == "The Kittiwake is\nfast. Always.\n3. Open\n4. Prime\n- gently\n9. Press"
    assert second.text == "a\n  b"
    assert find_number(first, first.text.index("Kitti")) == 3 and find_number(first, first.text.index("3.")) == 5
    assert find_number(second, second.text.index("b")) == 8


def test_only_the_main_part_of_a_page_is_read(tmp_path):
    page = "<title>T</title><div>Skip to content</div><main><h1>Locks</h1><p>Open at six.</p></main><div>Adverts</div>"
    assert texts(tmp_path / "a.html", page) == [("T > Locks", "Open at six.")]


def test_a_page_that_is_nested_deeply_or_empty_is_read(tmp_path):
    assert texts(tmp_path / "a.html", "<div>" * 1000 + "deep")[0][1] == "deep"
    assert texts(tmp_path / "b.html", "<!-- nothing -->") == []


# ------------------------------------------------------------------------------- Word, slides, books, mails


def test_a_word_file_has_headings_numbers_and_notes_but_no_deletions(tmp_path):
    import docx
    from docx.oxml import parse_xml

    document = docx.Document()
    document.add_heading("Pump", 1)
    document.add_paragraph("Before you start:")
    document.add_paragraph("Open the cock.", style="List Number")
    document.add_paragraph("Prime the pump.", style="List Number")
    document.add_paragraph("Wait a minute.")
    document.add_paragraph("Press the button.", style="List Number")
    document.add_paragraph("Ear plugs.", style="List Bullet")
    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    changed = document.add_paragraph("The notice is ")._p
    changed.append(parse_xml(f'<w:del {w} w:id="1"><w:r><w:delText>nine</w:delText></w:r></w:del>'))
    changed.append(parse_xml(f'<w:ins {w} w:id="2"><w:r><w:t>four weeks</w:t></w:r></w:ins>'))
    changed.append(parse_xml(f"<w:r {w}><w:rPr><w:vanish/></w:rPr><w:t>hidden</w:t></w:r>"))
    document.sections[0].header.paragraphs[0].text = "Contract HT-2207"
    document.save(tmp_path / "a.docx")
    ((heading, text),) = texts(tmp_path / "a.docx")
    assert heading == "Pump"
    assert text.split("\n") == [
        *("Before you start:", "1. Open the cock.", "2. Prime the pump.", "", "Wait a minute.", "3. Press the button."),
        *("- Ear plugs.", "", "The notice is four weeks", "", "Contract HT-2207"),
    ]


def test_a_footnote_stands_where_it_is_called(tmp_path):
    import docx
    from docx.opc.constants import RELATIONSHIP_TYPE
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part
    from docx.oxml import parse_xml

    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    document = docx.Document()
    rent = document.add_paragraph("The rent is 300 EUR.")
    rent._p.append(parse_xml(f'<w:r {w}><w:footnoteReference w:id="2"/></w:r>'))
    note = '<w:footnote w:id="2"><w:p><w:r><w:t>Heating: 45 EUR.</w:t></w:r></w:p></w:footnote>'
    notes = f"<w:footnotes {w}>{note}</w:footnotes>"
    content_type = "application/vnd.openxmlformats-officedocument.wordprocessingml.footnotes+xml"
    part = Part(PackURI("/word/footnotes.xml"), content_type, notes.encode(), document.part.package)
    document.part.relate_to(part, RELATIONSHIP_TYPE.FOOTNOTES)
    document.save(tmp_path / "a.docx")
    assert texts(tmp_path / "a.docx")[0][1].startswith("The rent is 300 EUR. (Heating: 45 EUR.)")


def test_slides_are_read_under_their_titles_with_notes(tmp_path):
    from pptx import Presentation

    deck = Presentation()
    slide = deck.slides.add_slide(deck.slide_layouts[1])
    slide.shapes.title.text = "Signals"
    slide.placeholders[1].text = "Two balls: closed.\nThree: open."
    slide.notes_slide.notes_text_frame.text = "Ask the pilot."
    deck.save(tmp_path / "a.pptx")
    (section,) = read(tmp_path / "a.pptx")
    assert (section.heading, section.unit) == ("Signals", "slide")
    assert section.text == "Two balls: closed.\nThree: open.\n\nAsk the pilot."


def test_mails_and_books_are_read(tmp_path):
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = "Würfel für N1", "ada@example.org", "bo@example.org"
    message.set_content("The gate code is 4411.\n")
    message.add_alternative("<p>The gate code is 4411.</p>", subtype="html")
    message.add_attachment(b"x", maintype="application", subtype="pdf", filename="plan.pdf")
    ((heading, text),) = texts(tmp_path / "a.eml", bytes(message))
    assert heading == "Würfel für N1" and text.startswith("From: ada@example.org")
    assert "The gate code is 4411." in text and text.endswith("Attachments: plan.pdf")
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="O/p.opf"/></container>')
        items = "".join(f'<item id="{c}" href="{c}%20x.xhtml" media-type="application/xhtml+xml"/>' for c in "ab")
        spine = '<spine><itemref idref="b"/><itemref idref="a"/></spine>'
        book.writestr("O/p.opf", f"<package><manifest>{items}</manifest>{spine}</package>")
        for c in "ab":
            book.writestr(f"O/{c} x.xhtml", f"<html><body><h1>Chapter {c}</h1><p>Text of {c}.</p></body></html>")
    sections = read(tmp_path / "a.epub")
    assert [(s.heading, s.text, s.marks[0][1]) for s in sections] == [
        ("Chapter b", "Text of b.", 1),
        ("Chapter a", "Text of a.", 2),
    ]


def test_restructured_text_has_headings(tmp_path):
    text = "=====\nTitle\n=====\n\nIntro.\n\nSub\n---\n\nBody text.\n\n.. note:: kept\n"
    first, second = read(tmp_path / "a.rst", text)
    assert (first.heading, first.text.strip()) == ("Title", "Intro.")
    assert second.heading == "Title > Sub" and "Body text." in second.text and ".. note:: kept" in second.text
    assert text.split("\n")[find_number(second, second.text.index("Body")) - 1] == "Body text."
    simple = "Before.\n\n=====  ====\nBerth  Fee\n=====  ====\nN1     12\nN2\n=====  ====\n\nAfter.\n"
    assert texts(tmp_path / "b.rst", simple)[0][1].split("\n") == [
        *("Before.", "", "", "Berth: N1 / Fee: 12", "Berth: N2 / Fee:", "", "After.", ""),
    ]


# ------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"\xd0\xcf\x11\xe0" + bytes(600), "encrypted, or saved in an old format"),
        ("a.xlsx", b"not a workbook", "BadZipFile"),
        ("a.epub", b"PK\x05\x06" + bytes(18), "KeyError"),
        ("a.pdf", b"%PDF-1.4 broken", "PdfiumError"),
        ("a.json", b"[" * 100_000, "not JSON"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, tokenizer, name, content, message):  # noqa: F811
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tmp_path / name, tokenizer)


def test_entities_of_a_book_are_not_resolved(tmp_path):
    (tmp_path / "secret").write_text("top secret")
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="p.opf"/></container>')
        evil = f'<!DOCTYPE p [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
        item = '<manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/></manifest>'
        book.writestr("p.opf", f'{evil}<package>{item}<spine><itemref idref="a"/></spine></package>')
        book.writestr("a.xhtml", f"{evil}<html><body><p>Before &x; after</p></body></html>")
    assert "top secret" not in texts(tmp_path / "a.epub")[0][1]
