"""Calls at the edges: every command with odd values of every flag, two flags at a time, and damaged files.

    python -m benchmarks.edges                # all of them, and a table: about twelve minutes
    python -m benchmarks.edges --share 10     # each tenth call

A call may end with 0, 2 (the user's mistake, told in words), 3 (refused), or 1 (a failed run, told in words, or a bad
finding of doctor). An exception that escapes, and a call that takes longer than SECONDS, is a fault of ours: then the
script ends with 1 and says how to repeat it.
"""

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import instruct_train_qlora
import rag_qlora
from qlora import console
from qlora.cli import rag_flags, training_flags
from qlora.markdown import as_markdown_table
from qlora.presets import SAMPLE_DATA

SECONDS = 120
SCRIPTS = {"instruct_train_qlora.py": instruct_train_qlora, "rag_qlora.py": rag_qlora}
TRAIN, RAG = SCRIPTS
TEXTS = ("", " ", "-1", "0", "1e999", "nan", "9" * 40, "a" * 5000, "../../x", "*", "a=b", "=", "\udce9", "\x1b[31m")
FACT = "The gale flag is hoisted at force seven."
STATES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "NUL bytes": lambda path: path.write_bytes(bytes(1000)),
    "other JSON": lambda path: path.write_text('[1, null, {"a": []}]'),
    "JSON of null": lambda path: path.write_text("null"),
    "a long line": lambda path: path.write_bytes(b"word " * 200_000),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a broken link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "no right to read": lambda path: path.chmod(0),  # root reads it
}


@dataclass(frozen=True)
class Call:
    """One call of a script, and what is odd about it; `damage` is done before."""

    kind: str
    script: str
    words: tuple[str, ...]
    damage: Callable[[], object] = bool


# ------------------------------------------------------------------------------- flags


def flag_calls(script: str, words: tuple[str, ...], parser: console.Parser) -> Iterator[Call]:
    """Calls with each flag of the parser: without its value, twice, and with each of TEXTS."""
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0:
            yield Call("flag twice", script, (*words, flag, flag))
            yield Call("value of a switch", script, (*words, f"{flag}=1"))
            continue
        yield Call("value missing", script, (*words, flag))
        yield Call("flag twice", script, (*words, f"{flag}=1", f"{flag}=2"))
        for text in TEXTS:
            yield Call("odd value", script, (*words, f"{flag}={text}"))


def pair_calls(script: str, words: tuple[str, ...], parser: console.Parser) -> Iterator[Call]:
    """Calls with two flags at a time, of those that are switches or take numbers."""
    flags = []
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "dry_run", "json", "verbose"):
            if action.nargs == 0:
                flags.append(action.option_strings[-1])
            elif getattr(action.type, "metavar", "") in ("N", "X"):
                flags.append(f"{action.option_strings[-1]}=1")
    for n, first in enumerate(flags):
        for second in flags[n + 1 :]:
            yield Call("two flags", script, (*words, first, second))


# ------------------------------------------------------------------------------- files


def file_calls(script: str, words: tuple[str, ...], folder: Path) -> Iterator[Call]:
    """A call per file of the folder and state of it, on a copy of the folder."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for state, damage in STATES.items():
            copy = folder.with_name(f"{folder.name}-{words[0]}-{file.name}-{state.replace(' ', '-')}")

            def damage_copy(copy=copy, file=file, damage=damage):
                shutil.copytree(folder, copy)
                damage(copy / file.relative_to(folder))

            named = tuple(word.replace(str(folder), str(copy)) for word in words)
            yield Call(f"file: {state}", script, named, damage_copy)


def make_documents(folder: Path) -> Path:
    """A file of every type, each with the FACT."""
    import docx
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    folder.mkdir()
    row = json.dumps({"rule": FACT})
    texts = {"a.txt": FACT, "b.md": f"# Flags\n\n{FACT}\n", "c.html": f"<title>t</title><p>{FACT}</p>"}
    texts |= {"d.csv": f"name,rule\nflag,{FACT}\n", "e.json": f"[{row}]", "f.jsonl": f"{row}\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    with PdfPages(folder / "g.pdf") as pdf:
        figure = Figure()
        figure.text(0.1, 0.5, FACT)
        pdf.savefig(figure)
    document = docx.Document()
    document.add_paragraph(FACT)
    document.save(folder / "h.docx")
    return folder


def make_rows(folder: Path) -> Path:
    """Some rows of the sample in every file type."""
    import pandas

    folder.mkdir()
    lines = (SAMPLE_DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[::40]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    table = pandas.read_json(folder / "rows.jsonl", lines=True)
    table.to_csv(folder / "rows.csv", index=False)
    table.to_parquet(folder / "rows.parquet")
    table.to_json(folder / "rows.json", orient="records")
    return folder


def make_base(folder: Path) -> Path:
    """A tiny Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.random_llama import SHAPES, make_tokenizer

    lines = (SAMPLE_DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[::40]
    tokenizer = make_tokenizer([json.loads(line)["context"] for line in lines], 1000, 1024)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = SHAPES["tiny"] | {"vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------- run


class Stuck(BaseException):
    """A call took longer than SECONDS; no `except Exception` catches it."""


def make_call(call: Call) -> tuple[str, str]:
    """The exit code of the call, or the name of the exception that escaped; and its stderr, or where it broke."""

    def stop(*given):
        raise Stuck

    call.damage()
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    err, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO("Who feeds the otter?\n/sources\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            return str(console.run(SCRIPTS[call.script].main, list(call.words))), err.getvalue()
    except BaseException as error:
        return type(error).__name__, traceback.format_exc()
    finally:
        signal.alarm(0)
        sys.stdin = stdin


def prepare(folder: Path) -> list[Call]:
    """All calls, on a tiny base model, an adapter, and documents in a collection, which are made in the folder."""
    rows, base, documents = make_rows(folder / "rows"), make_base(folder / "base"), make_documents(folder / "documents")
    (folder / "questions").mkdir()
    lines = [{"question": "Who feeds the otter?", "answers": ["the bosun"]}, {"question": "Why?", "answers": []}]
    (folder / "questions" / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = "--base-model", f"{base}", "--dataset", f"{rows}/rows.jsonl", "--distractors", "0", "--eval-answers", "0"
    steps = "--max-steps", "2", "--warmup", "0", "--learning-rate", "0.02", "--overwrite"
    questions, model = ("--questions", f"{folder}/questions/q.jsonl"), ("--adapter", f"{folder}/adapter")
    model += "--max-new-tokens", "2"
    works = {
        "train": (*trained, *steps, "--output", f"{folder}/adapter"),
        "ingest": ("ingest", f"{documents}"),
        "documents": ("documents",),
        "forget": ("forget", "nothing"),
        "search": ("search", "Who?"),
        "ask": ("ask", *model, "Who?"),
        "chat": ("chat", *model),
        "demo": ("demo", *model),
        "evaluate": ("evaluate", *model, *questions, "--output", f"{folder}/evaluation"),
        "sweep": ("sweep", "search=dense", *questions, "--output", f"{folder}/sweep"),
        "compare": ("compare", *[f"{folder}/evaluation/evaluation.json"] * 2),
        "doctor": ("doctor",),
    }
    for name in ("train", "ingest", "evaluate"):
        code, said = make_call(Call("", TRAIN if name == "train" else RAG, works[name]))
        assert code == "0", said
    calls = [call for name, words in works.items() for call in odd_calls(name, words)]
    for name in sorted(path.name for path in rows.iterdir()):
        words = *trained[:3], f"{rows}/{name}", *trained[4:], "--dry-run", "--output", f"{folder}/x"
        calls += [call for call in file_calls(TRAIN, words, rows) if f"-{name}-" in " ".join(call.words)]
    calls += file_calls(TRAIN, (*trained, *steps, "--output", f"{folder}/other"), base)
    for name, damaged in {"ask": "adapter", "evaluate": "evaluation", "compare": "evaluation"}.items():
        calls += file_calls(RAG, works[name], folder / damaged)
    calls += file_calls(RAG, works["sweep"], folder / "questions")
    calls += file_calls(RAG, (*works["ingest"], "--collection", "damaged"), documents)
    return calls


def odd_calls(name: str, words: tuple[str, ...]) -> Iterator[Call]:
    """The calls of `flag_calls` and `pair_calls` for one command."""
    if name == "train":
        given = TRAIN, (*words, "--dry-run"), training_flags.build_parser("", SCRIPTS[TRAIN].STEPS)
    else:
        _, commands = rag_flags.build_parser("", SCRIPTS[RAG].STEPS)
        given = RAG, (*words, "--dry-run") if name == "ingest" else words, commands[name]
    yield from flag_calls(*given)
    yield from pair_calls(*given)


def count_calls(calls: list[Call]) -> tuple[Counter, list[str]]:
    """The number of calls by (kind, exit code), and a text for each fault of ours."""
    counts, faults = Counter(), []
    for call in console.progress().track(calls, description="calls") if sys.stderr.isatty() else calls:
        code, said = make_call(call)
        counts[call.kind, code] += 1
        if not code.isdigit():
            faults.append(f"{call.kind}: python {call.script} {shlex.join(call.words)}\n{said}")
    return counts, faults


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=int, default=1, metavar="N", help="make each N-th call only")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="edges") as folder:
        # No network: what is not here should be told at once.
        os.environ |= {"QLORA_DATA_DIR": f"{folder}/data", "QLORA_COLLECTION": "edges", "HF_HUB_OFFLINE": "1"}
        Path(folder).chmod(0o755)  # for root's database server
        Path(folder, "work").mkdir()
        os.chdir(f"{folder}/work")
        counts, faults = count_calls(prepare(Path(folder, "work"))[:: args.share])
        os.chdir("/")
    codes = sorted({code for _, code in counts})
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    rows = [[kind, *(str(counts[kind, code] or "") for code in codes)] for kind in kinds]
    rows.append(["all", *(str(sum(counts[kind, code] for kind in kinds)) for code in codes)])
    print(as_markdown_table([["kind of call", *(f"exit {code}" for code in codes)], *rows]))
    print("\n".join(["", *faults, f"{counts.total()} calls, {len(faults)} faults"]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
