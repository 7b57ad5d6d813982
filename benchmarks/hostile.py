"""Documents that were made to hurt: how long reading and splitting each takes, and how much memory.

python -m benchmarks.hostile              # each in a process of its own; a table
"""

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from qlora.markdown import as_markdown_table

MB = 1_000_000


def docx(document: bytes) -> bytes:
    """A Word file with this document.xml."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", document)
    return file.getvalue()


WORD = '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"><w:body>'
LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))


def pdf(*objects: bytes) -> bytes:
    """A PDF file of these objects, the first its catalog."""
    file, places = b"%PDF-1.7\n", []
    for n, text in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(file))
        file += b"%d 0 obj\n%s\nendobj\n" % (n, text)
    size = len(objects) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, b"".join(places))
    return file + table + b"trailer << /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF\n" % (size, len(file))


def stream(content: bytes, rounds: int = 1) -> bytes:
    for _ in range(rounds):
        content = zlib.compress(content, 9)
    filters = b"[" + b" /FlateDecode" * rounds + b" ]"
    return b"<< /Length %d /Filter %s >> stream\n%s\nendstream" % (len(content), filters, content)


FONT = b"/Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
PAGE = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << %s >> >>" % FONT
CATALOG, PAGES = b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
FILES = {
    "a 5 MB line": (".txt", lambda: b"word " * MB),
    "a 5 MB word": (".txt", lambda: b"x" * 5 * MB),
    "5 MB of empty lines": (".txt", lambda: b"\n" * 5 * MB),
    "5 MB of Chinese on a line": (".txt", lambda: "船".encode() * (5 * MB // 3)),
    "50 MB of text": (".txt", lambda: b"The gale flag is hoisted at force seven. \n" * (50 * MB // 42)),
    "10,000 nested lists": (".md", lambda: "".join(" " * n + "- x\n" for n in range(10_000)).encode()),
    "10,000 nested quotations": (".md", lambda: (b">" * 10_000 + b" x\n") * 5),
    "200,000 headings": (".md", lambda: b"# h\n\nline\n\n" * 200_000),
    "a 5 MB heading": (".md", lambda: b"# " + b"word " * MB),
    "10,000 nested tags": (".html", lambda: b"<div>" * 10_000 + b"x" + b"</div>" * 10_000),
    "1,000,000 nested tags": (".html", lambda: b"<b>" * MB + b"x"),
    "1,000,000 tags": (".html", lambda: b"<p>x</p>" * MB),
    "a 5 MB tag": (".html", lambda: b"<p a='" + b"x" * 5 * MB + b"'>x</p>"),
    "5 MB of <": (".html", lambda: b"<" * 5 * MB),
    "5 MB of <!--": (".html", lambda: b"<!--" * MB),
    "1,000,000 entities": (".html", lambda: b"&amp;" * MB),
    "1,000,000 nested JSON lists": (".json", lambda: b"[" * MB + b"]" * MB),
    "a number of 5 MB": (".json", lambda: b"1" * 5 * MB),
    "5 MB of quotes": (".csv", lambda: b'a,"' + b'""' * (5 * MB // 2)),
    "1,000,000 columns": (".csv", lambda: b"a," * MB + b"\n" + b"b," * MB),
    "zip bomb, 1 GB": (".docx", lambda: docx(bytes(1000 * MB))),
    "XML entities, 1 GB": (
        ".docx",
        lambda: docx(f'<!DOCTYPE x [<!ENTITY l0 "lol">{LAUGHS}]>{WORD}&l9;</w:body></w:document>'.encode()),
    ),
    "100,000 nested XML tags": (".docx", lambda: docx(f"{WORD}{'<w:p>' * 100_000}".encode())),
    "1,000,000 paragraphs": (
        ".docx",
        lambda: docx(f"{WORD}{'<w:p><w:r><w:t>x</w:t></w:r></w:p>' * MB}</w:body></w:document>".encode()),
    ),
    "a good PDF": (".pdf", lambda: pdf(CATALOG, PAGES, PAGE, stream(b"BT /F1 9 Tf (word) Tj ET"))),
    "a page tree that is a loop": (".pdf", lambda: pdf(CATALOG, b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>")),
    "1,000,000,000 pages": (".pdf", lambda: pdf(CATALOG, b"<< /Type /Pages /Kids [3 0 R] /Count 1000000000 >>", PAGE)),
    "a stream that is a bomb, 1 GB": (".pdf", lambda: pdf(CATALOG, PAGES, PAGE, stream(bytes(1000 * MB)))),
    "a bomb in a bomb": (".pdf", lambda: pdf(CATALOG, PAGES, PAGE, stream(bytes(1000 * MB), 2))),
    "5 MB of operators": (
        ".pdf",
        lambda: pdf(CATALOG, PAGES, PAGE, stream(b"BT /F1 9 Tf (x) Tj ET " * (5 * MB // 22))),
    ),
    "100,000 nested PDF lists": (".pdf", lambda: pdf(CATALOG, PAGES, PAGE, stream(b"[" * 100_000))),
    "a form that draws itself": (
        ".pdf",
        lambda: pdf(
            CATALOG,
            PAGES,
            PAGE.replace(FONT, b"/XObject << /F 5 0 R >>"),
            stream(b"/F Do"),
            b"<< /Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /F 5 0 R >> >> /Length 5 >> "
            b"stream\n/F Do\nendstream",
        ),
    ),
}


def read_one(path: Path) -> dict:
    """What became of the file: passages, or why not; seconds, and how far memory grew in MB."""
    from transformers import AutoTokenizer

    from qlora import presets
    from qlora.console import UserError
    from qlora.model import base_model
    from qlora.retrieval import documents
    from qlora.retrieval.passages import Splitting

    tokenizer = AutoTokenizer.from_pretrained(base_model.resolve_embedding_model(presets.EMBEDDED_EMBEDDER))
    warm = path.with_name("warm" + path.suffix)
    warm.write_bytes(b"word")
    for file in (warm, path):
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            passages = documents.load_passages(file, file.name, tokenizer, Splitting("ours", 256, 120, 24))
            result = f"{sum(1 for _ in passages):,} passages"
        except UserError as error:
            result = error.problems[0].what[:90]
        seconds = time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"result": result, "seconds": seconds, "mb": grown / 1000}


def main(argv: list[str]) -> None:
    if argv:
        print(json.dumps(read_one(Path(argv[0]))))
        return
    rows = [["document", "type", "size MB", "seconds", "memory MB", "result"]]
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, make) in FILES.items():
            path = Path(folder, f"hostile{suffix}")
            path.write_bytes(make())
            size = f"{path.stat().st_size / MB:.1f}"
            try:
                words = [sys.executable, "-m", "benchmarks.hostile", str(path)]
                done = subprocess.run(words, capture_output=True, text=True, timeout=300)
                found = json.loads(done.stdout.splitlines()[-1])
                row = [f"{found['seconds']:.1f}", f"{found['mb']:,.0f}", found["result"]]
            except subprocess.TimeoutExpired:
                row = ["> 300", "", "stopped"]
            except (ValueError, IndexError):
                row = ["", "", f"died with {done.returncode}: {done.stderr.strip()[-80:]}"]
            rows.append([name, suffix, size, *row])
            print(rows[-1], file=sys.stderr, flush=True)
    print(as_markdown_table(rows, left=2))


if __name__ == "__main__":
    main(sys.argv[1:])
