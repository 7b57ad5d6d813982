"""Markdown tables, and the sections of a page that programs write."""

from pathlib import Path

from qlora.console import fail
from qlora.machine import write_whole


def as_markdown_table(rows: list[list[str]], left: int = 1) -> str:
    """Rows, the first of them headings, with the first `left` columns aligned left."""
    head, *body = rows
    ruler = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ruler, *body])


def put_section(page: Path, name: str, text: str, title: str = "") -> None:
    """Replaces what is between `<!-- name -->` and `<!-- end of name -->` in a page.

    A page without the marks gets them at its end, below `title`; without a title it raises UserError.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if bool(mark) != bool(closed) or not (mark or title):
        raise fail(f"no section {name}", str(page), f"write {begin.strip()} and {end.strip()} into it")
    before += "" if mark else f"\n## {title}\n\n"
    write_whole(page, f"{before}{begin}{text}\n{end}{after}")
