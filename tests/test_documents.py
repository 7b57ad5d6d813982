"""Files of every type, read, split into passages, and refused when there is nothing to read."""

import itertools
import json
import zipfile

import pytest
from conftest import process

from qlora import presets
from qlora.console import UserError
from qlora.model import base_model
from qlora.reading import kinds, pdf, reader
from qlora.reading.kinds import read_sections
from qlora.reading.section import Section, find_number
from qlora.retrieval import documents, passages
from qlora.retrieval.documents import embedded_text, find_files, fingerprint_file, load_passages, place
from qlora.retrieval.passages import Splitting, split_sections

FACT = "The gale flag is hoisted at force seven."


def make_pdf(path, *pages):
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"pdf.fonttype": 42}), PdfPages(path) as pdf:
        for text in pages:
            figure = Figure()
            figure.text(0.1, 0.5, text)
            pdf.savefig(figure)


def make_docx(path):
    import docx

    document = docx.Document()
    document.add_paragraph(FACT)
    document.save(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_bytes(f"Préface\n{FACT}".encode("latin-1"))
    (tmp_path / "b.md").write_text(f"# Flags\n\n## Gales\n\n{FACT}\n", encoding="utf-8")
    (tmp_path / "c.html").write_text(f"<title>t</title><script>x()</script><p>{FACT}</p><td>nine</td><td>ten</td>")
    make_pdf(tmp_path / "d.pdf", "First page.", FACT)
    make_docx(tmp_path / "e.docx")
    (tmp_path / "f.csv").write_text(f"name,rule\nnothing,none\nflag,{FACT}\n")
    (tmp_path / "g.json").write_text(json.dumps([{"rule": "none"}, {"rule": FACT}]))
    (tmp_path / "h.jsonl").write_text(f'{{"rule": "none"}}\n{{"rule": "{FACT}"}}\n')
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model.resolve_embedding_model(presets.EMBEDDED_EMBEDDER))


SPLITTING = Splitting("fake", 256, 200, 40)


def load(file, tokenizer, splitting=SPLITTING, source=None):
    return list(load_passages(file, source or file.name, tokenizer, splitting))


def test_every_type_is_read_and_says_where_the_fact_stands(folder, tokenizer):
    places = {}
    for file, source in ((found.path, found.source) for found in find_files([str(folder)])):
        passages = load(file, tokenizer, source=source)
        found = [passage for passage in passages if FACT in passage.page_content]
        assert len(found) == 1, source
        assert found[0].metadata["source"] == source
        assert "x()" not in found[0].page_content and str(folder) not in str(found[0].metadata)
        places[source] = place(found[0].metadata)
    assert places == {
        "a.txt": "a.txt, line 1",
        "b.md": "b.md, line 5, Flags > Gales",
        "c.html": "c.html, line 1, t",
        "d.pdf": "d.pdf, page 2",
        "e.docx": "e.docx, paragraph 1",
        "f.csv": "f.csv, row 2",
        "g.json": "g.json, row 2",
        "h.jsonl": "h.jsonl, row 2",
    }


def test_folders_are_walked_without_hidden_files_links_and_other_types(folder, tmp_path):
    (folder / ".git").mkdir()
    (folder / ".git" / "secret.md").write_text("secret")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.md").write_text("text")
    (folder / "picture.png").write_bytes(b"png")
    (folder / "link.md").symlink_to("/etc/hostname")
    sources = [file.source for file in find_files([str(folder)])]
    assert "sub/x.md" in sources and len(sources) == 9


def test_all_bad_paths_are_told_at_once(tmp_path):
    (tmp_path / "a.exe").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        find_files([str(tmp_path / "gone.md"), str(tmp_path / "a.exe"), str(tmp_path / "empty")])
    text = str(error.value)
    assert "file not found" in text and "unknown file type .exe" in text and "no documents in the folder" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.4 broken", "unreadable .pdf"),
        ("a.docx", b"not a zip", "unreadable .docx"),
        ("a.json", b"{", "not JSON"),
        ("a.jsonl", b'{"a": 1}\n{', "a.jsonl:2"),
        ("a.md", b"  \n\n", "no text"),
        ("a.csv", b"", "no text"),
    ],
)
def test_unreadable_and_empty_documents(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name, tokenizer)
    assert message in str(error.value)


def test_a_pdf_without_text_is_named(tmp_path, tokenizer):
    make_pdf(tmp_path / "scan.pdf", "")
    with pytest.raises(UserError, match=r"no text - .*scan.pdf - (scanned\?|give --ocr)"):
        load(tmp_path / "scan.pdf", tokenizer)


@pytest.mark.parametrize("of", ["embedder", "base model"])
def test_passages_fit_the_window_overlap_and_lose_nothing(tmp_path, tokenizer, of):
    if of == "base model":  # bytes and merges instead of word pieces
        tokenizer = base_model.load_tokenizer(base_model.resolve_base_model(presets.EMBEDDED))
    words = " ".join(f"word{n} means thing{n}." for n in range(400))
    heading = "A very long heading " * 6
    (tmp_path / "long.md").write_text(f"# {heading}\n\n{words}\n\n```\n# no heading\n```\n")
    passages = load(tmp_path / "long.md", tokenizer)
    assert len(passages) > 5
    for passage in passages:
        assert len(tokenizer(passage.page_content, add_special_tokens=False).input_ids) <= 200
        assert len(tokenizer(embedded_text(passage)).input_ids) <= 256
        assert passage.metadata["heading"] == heading.strip()
    assert all(any(f"word{n} " in passage.page_content for passage in passages) for n in range(400))
    shared = [set(a.page_content.split()) & set(b.page_content.split()) for a, b in itertools.pairwise(passages)]
    assert sum(len(words) > 3 for words in shared) >= len(shared) - 1


def test_lines_count_within_a_section(tmp_path, tokenizer):
    text = "# T\n\nintro\n\n## S\n\n" + "\n".join(f"Line {n} of this text is here." for n in range(1, 200))
    (tmp_path / "t.md").write_text(text)
    lines = text.split("\n")
    for passage in load(tmp_path / "t.md", tokenizer, Splitting("fake", 256, 100, 20)):
        assert passage.page_content.split("\n")[0] in lines[passage.metadata["line"] - 1]


def test_other_encodings_are_detected(tmp_path, tokenizer):
    text = "naïve café façade: the déjà vu of a crème brûlée at the château, près de l'église " * 8
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.csv").write_bytes(f"name,dish\nRené,{text}\n".encode("latin-1"))
    (tmp_path / "c.json").write_bytes(json.dumps([text], ensure_ascii=False).encode("utf-16"))
    for name in ("a.txt", "b.csv", "c.json"):
        assert "crème brûlée at the château" in load(tmp_path / name, tokenizer)[0].page_content


def test_too_large_and_too_long_files_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "MOST_BYTES", 100)
    monkeypatch.setattr(pdf, "MOST_PAGES", 0)
    (tmp_path / "large.txt").write_text("x" * 101)
    with pytest.raises(UserError, match="too large"):
        fingerprint_file(tmp_path / "large.txt", SPLITTING)
    make_pdf(tmp_path / "long.pdf", "A page.")
    with pytest.raises(UserError, match="too many"):
        list(read_sections(tmp_path / "long.pdf"))


@pytest.fixture
def own_reader(monkeypatch):
    """A reading process of this test's own, with other bounds."""
    reader.reader.cache_clear()
    monkeypatch.setattr(reader, "MEMORY", 1_500_000_000)
    yield
    reader.reader().stop()
    reader.reader.cache_clear()


def test_a_file_that_takes_too_long_or_too_much_memory_stops_no_other(tmp_path, tokenizer, own_reader, monkeypatch):
    (tmp_path / "good.md").write_text("The gale flag is hoisted.")
    (tmp_path / "slow.rst").write_text("a\n=\n\n" * 20_000)
    (tmp_path / "large.json").write_text(f"[{'11,' * 25_000_000}11]")
    assert load(tmp_path / "good.md", tokenizer)
    monkeypatch.setattr(reader, "SECONDS", 1)
    monkeypatch.setattr(reader, "SECONDS_PER_MB", 0)
    with pytest.raises(UserError, match=r"takes longer than 1 s - .*slow.rst"):
        load(tmp_path / "slow.rst", tokenizer)
    monkeypatch.setattr(reader, "SECONDS", 60)
    with pytest.raises(UserError, match=r"takes more than 2 GB - .*large.json"):
        load(tmp_path / "large.json", tokenizer)
    assert load(tmp_path / "good.md", tokenizer)


def test_a_file_that_would_unpack_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "MOST_UNPACKED", 1_000_000)
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("word/document.xml", bytes(2_000_000))
    with pytest.raises(UserError, match=r"unpacks to 0.0 GB .* - .*bomb.docx"):
        read_sections(tmp_path / "bomb.docx")


@pytest.mark.parametrize("separator", ["\n", " "])
def test_a_long_section_is_split_in_parts_that_know_their_place(tokenizer, monkeypatch, separator):
    section = Section(separator.join(f"Sentence number {n} is here." for n in range(300)))
    sizes = Splitting("fake", 256, 60, 0)
    whole = list(split_sections([section], "a.txt", tokenizer, sizes))
    texts = [passage.page_content for passage in whole]
    assert all(text.startswith("Sentence") and text.endswith("here.") for text in texts)
    monkeypatch.setattr(passages, "AT_ONCE", 1000)
    parts = list(split_sections([section], "a.txt", tokenizer, sizes))
    joined = "".join("".join(part.page_content.split()) for part in parts)
    assert len(parts) > len(whole) and joined == "".join(section.text.split())
    for part in parts:
        begin = section.text.index(part.page_content)
        assert section.text.count("\n", 0, begin) + 1 == part.metadata["line"]


def test_a_script_that_reads_files_is_not_run_twice(tmp_path):
    (tmp_path / "a.md").write_text(FACT)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom qlora.reading.reader import read_file\n"
        f"print('run', next(read_file(Path({str(tmp_path / 'a.md')!r}))).text)\n"
    )
    done = process(script)
    assert done.stdout == f"run {FACT}\n", done.stderr


def test_nothing_outside_the_folder_is_taken(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "CVS", inside / ".git", outside):
        folder.mkdir(parents=True)
        (folder / "a.md").write_text("x")
    (inside / "mine.md").write_text("x")
    (inside / "link.md").symlink_to(outside / "a.md")
    (inside / "linked").symlink_to(outside)
    assert [file.source for file in find_files([str(inside)])] == ["mine.md"]


def test_fingerprint_depends_on_content_and_splitting(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    other = Splitting("fake", 256, 100, 40)
    same = fingerprint_file(tmp_path / "a", SPLITTING)
    assert same == fingerprint_file(tmp_path / "b", SPLITTING) != fingerprint_file(tmp_path / "a", other)


def test_languages_of_ocr_are_part_of_the_fingerprint_of_a_pdf_only(tmp_path):
    with_ocr = Splitting("fake", 256, 200, 40, "eng")
    for name in ("a.txt", "a.pdf"):
        (tmp_path / name).write_text("x")
        equal = fingerprint_file(tmp_path / name, SPLITTING) == fingerprint_file(tmp_path / name, with_ocr)
        assert equal == (name == "a.txt")


def test_odd_text_goes_in(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text('["lone \\ud800 surrogate and \\u0000 byte"]')
    assert load(tmp_path / "a.json", tokenizer)[0].page_content.count("?") == 1
    (tmp_path / "b.jsonl").write_text('{"a": "line\u2028separator"}\n', encoding="utf-8")
    assert len(load(tmp_path / "b.jsonl", tokenizer)) == 1
    (tmp_path / "c.md").write_text("# " + "no heading " * 400 + "\n\ntext\n")
    assert len(tokenizer(embedded_text(load(tmp_path / "c.md", tokenizer)[0])).input_ids) <= 256
    (tmp_path / "d.html").write_text("<table><tr><td>nine</td><td>ten</td></tr></table>")
    assert load(tmp_path / "d.html", tokenizer)[0].page_content == "nine / ten"


def test_two_files_of_one_name_are_not_mixed_up(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(name)
    with pytest.raises(UserError, match="two files with one name"):
        find_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(find_files([str(tmp_path)])) == 2


def test_a_file_that_is_named_twice_is_one_document(tmp_path, monkeypatch):
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("x")
    (folder / "sub" / "b.md").write_text("x")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "loop.md").symlink_to(folder / "loop.md")
    monkeypatch.chdir(tmp_path)
    every_way = ["docs/sub/b.md", "docs/sub", "docs", "docs", f"{folder}/", "docs/sub/../a.md", "docs/sub/loop"]
    for paths in (every_way, every_way[::-1]):
        assert [file.source for file in find_files(paths)] == ["a.md", "sub/b.md"]
    with pytest.raises(UserError, match="file not found"):
        find_files(["docs/loop.md"])


MARKDOWN = """---
title: front matter
---

Part one
========

# Closed # ##
```a fence of one line```
# After the fence
~~~sh
# a comment
```
# another
~~~
- # in a list

      # indented code

> # a quotation

<pre>
# in HTML
</pre>

   ## Indented
#no heading
Shutdown
--------
text
````
```
# still code
"""


def test_headings_are_those_of_commonmark(tmp_path):
    (tmp_path / "a.md").write_text(MARKDOWN)
    sections = list(read_sections(tmp_path / "a.md"))
    assert [section.heading for section in sections] == [
        "",
        "Closed #",
        "After the fence",  # with the one below it that has no text
        "After the fence > #no heading Shutdown",
    ]
    lines = MARKDOWN.split("\n")
    for section in sections:  # each where it says, and nothing but headings left out
        assert section.text.removesuffix("\nIndented") in MARKDOWN
        assert lines[find_number(section, 0) - 1] == section.text.split("\n")[0]
