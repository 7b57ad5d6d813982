"""All that a person sees of ask, chat, ingest, evaluate and one error, word for word.

`python tests/test_transcripts.py` writes the transcripts anew; what differs from run to run is replaced by a word.
"""

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, rag

TRANSCRIPTS = PROJECT / "tests" / "transcripts"
CHANGING = {  # what differs between runs and machines -> the word for it
    r"Computes on .*": "Computes on MACHINE",
    r"\d+\.\d s\b": "SECONDS",
    r"( [\d,]+\.\d/s)?  ?(\d:\d\d:\d\d|-:--:--) left": " RATE TIME left",  # no rate where all was done at once
    r"\d:\d\d:\d\d|-:--:--": "TIME",
    r"[━╸╺]+": "BAR",
    r"-?\d\.\d\d\b": "NUMBER",
    r"[+-]NUMBER": "NUMBER",
    r"─+": "---",
    r" {3,}": "  ",
    r" +$": "",
    r"^ ([\w@ ]+?)  NUMBER.*": r" \1  NUMBERS",  # which of them are undefined is up to an untrained model
    r"^ (refusal|citation|in) (\w+)$": r" \1 \2  NUMBERS",
    r"postgres at \S+:": "postgres at SERVER:",
    r"/\S*/tiny-llama\b": "tiny-llama",
}


def scrub(text: str) -> str:
    for pattern, word in CHANGING.items():
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


@pytest.mark.parametrize("name", ["ingest", "ask", "chat", "evaluate", "error"])
def test_transcript(request, name, collection, documents, tiny_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_COLLECTION", "staff")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdin", io.StringIO("Who feeds the otter?\n/sources\n/nonsense\n/quit\n"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Who feeds the otter?", "answers": ["the bosun"]}\n' * 2, encoding="utf-8")
    shutil.copytree(tiny_adapter, "tiny")
    answered = "--adapter", "tiny", "--max-new-tokens", 4, "--where", "source=nothing.md"
    words = {
        "ingest": ["ingest", "docs", "--passage-tokens", 60],
        "ask": ["ask", *answered, "Who feeds the otter?", "What does a berth cost?"],
        "chat": ["chat", *answered],
        "evaluate": ["evaluate", *answered, "--questions", questions, "--output", "report"],
        "error": ["ask", "--adapter", "nowhere", "--top-k", 0, "--serch=dense", "Who?"],
    }
    if name != "ingest":
        assert rag("ingest", "docs") == 0
        capsys.readouterr()
    code = rag(*words[name])
    said = capsys.readouterr()
    found = scrub(f"exit code {code}\n--- stdout\n{said.out}--- stderr\n{said.err}")
    path = TRANSCRIPTS / f"{name}.txt"
    if request.config.getoption("--write"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


if __name__ == "__main__":
    TRANSCRIPTS.mkdir(exist_ok=True)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", str(Path(__file__)), "--write"]))
