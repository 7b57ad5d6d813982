#!/usr/bin/env python
"""Many askers at once: answers per second, seconds to the first token and to the last, and whether any answer is wrong.

    python -m benchmarks.serve_load --adapter adapters/demo --collection demo      # five minutes on two cores
    python -m benchmarks.serve_load --adapter adapters/demo --collection demo --write docs/measurements.md

A real server, streamed answers, the sample's questions. Every question is asked alone first. Later answers are compared
with that: `mixed` are answers to another question, `other` are worded otherwise (a batch rounds otherwise), `lost` did
not arrive. In the last round a document is uploaded and the database is stopped meanwhile.
"""

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from benchmarks.trials import PROJECT, SAMPLE
from qlora import console
from qlora.markdown import as_markdown_table, put_section

ASKERS = (1, 4, 8, 16)
QUESTIONS = 24
HEADS = ["askers", "answers", "per second", "first token p50", "p95", "whole p50", "p95", "other", "mixed", "lost"]


def main(argv: list[str]) -> int:
    args, problems = console.parse_arguments(build_parser(), argv)
    problems.raise_if_any()
    lines = [json.loads(line) for line in (SAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [line["question"] for line in lines[:: len(lines) // QUESTIONS]][:QUESTIONS]
    with serving(args.adapter, args.collection) as url:
        rows = asyncio.run(measure(url, questions, args.seconds))
    text = as_markdown_table([HEADS, *rows])
    print(text)
    if args.write:
        put_section(args.write, "serve-load", text)
    return 0


@contextlib.contextmanager
def serving(adapter: Path, collection: str):
    """The address of a real server, which is stopped in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "rag_qlora.py", "serve", "--adapter", str(adapter), "--collection", collection]
    process = subprocess.Popen([*command, "--port", str(port), "--queue", "64"], cwd=PROJECT, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def measure(url: str, questions: list[str], seconds: float) -> list[list[str]]:
    """A table row per number of askers; the last round is disturbed."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=100)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        alone = {question: (await ask(client, model, question))[0] for question in questions}
        rounds = [(count, "") for count in ASKERS] + [(ASKERS[-1], ", an upload and a database restart meanwhile")]
        rows = []
        for count, what in rounds:
            disturbing = asyncio.create_task(disturb(client, seconds)) if what else None
            started = time.perf_counter()
            orders = [itertools.cycle(questions[n:] + questions[:n]) for n in range(count)]
            work = [keep_asking(client, model, order, started + seconds) for order in orders]
            answers = list(itertools.chain.from_iterable(await asyncio.gather(*work)))
            if disturbing:
                await disturbing
            rows.append([f"{count}{what}", *describe(answers, alone, started, seconds)])
            console.note("  ".join(rows[-1]))
        return rows


async def keep_asking(client, model: str, questions, until: float) -> list[tuple]:
    """(question, text, seconds to the first token, to the last, time of the end) of one asker's answers."""
    found = []
    while time.perf_counter() < until:
        question = next(questions)
        try:
            found.append((question, *await ask(client, model, question), time.perf_counter()))
        except (httpx.HTTPError, ValueError, KeyError):
            found.append((question, None, 0.0, 0.0, 0.0))
    return found


async def ask(client, model: str, question: str) -> tuple[str, float, float]:
    """The checked answer, and the seconds to its first piece and to its end."""
    started = time.perf_counter()
    first, text = 0.0, None
    body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            choice = event["choices"][0]
            if choice["delta"].get("content") and not first:
                first = time.perf_counter() - started
            text = event.get("answer", text)
    if text is None:
        raise ValueError("the answer has no end")
    return text, first, time.perf_counter() - started


async def disturb(client, seconds: float) -> None:
    """Uploads a document, and stops the embedded database, which is started again by the next question."""
    await asyncio.sleep(seconds / 4)
    text = "\n\n".join(f"The load test of the harbour, part {n}, says nothing of interest." for n in range(400))
    await client.post("/documents", files=[("files", ("load-test.txt", text.encode()))], params={"replace": True})
    await asyncio.sleep(seconds / 4)
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "postgres" and "-D" in (process.info["cmdline"] or []):
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
    await asyncio.sleep(seconds / 4)
    await client.delete("/documents/load-test.txt")


def describe(answers: list[tuple], alone: dict[str, str], started: float, seconds: float) -> list[str]:
    """The cells of a row. The rate is that of the round: at its end askers leave one by one."""
    whole = [answer for answer in answers if answer[1] is not None]
    rate = sum(answer[-1] < started + seconds for answer in whole) / seconds
    wrong = Counter(judge(question, text, alone) for question, text, *_ in whole)
    firsts, ends = ([answer[n] for answer in whole] for n in (2, 3))
    times = [f"{value:.1f}" for part in (firsts, ends) for value in (statistics.median(part), quantile(part))]
    counts = [str(wrong[name]) for name in ("other", "mixed")]
    return [str(len(whole)), f"{rate:.2f}", *times, *counts, str(len(answers) - len(whole))]


def judge(question: str, text: str, alone: dict[str, str]) -> str:
    """Whether an answer is the one that its question got alone, another question's, or worded otherwise."""
    if text == alone[question]:
        return "same"
    others = {answer for asked, answer in alone.items() if asked != question and len(answer.split()) > 3}
    return "mixed" if text in others else "other"


def quantile(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def build_parser() -> console.Parser:
    title, _, text = __doc__.partition("\n\n")
    parser = console.Parser(usage="python -m benchmarks.serve_load [flags]", description=title, epilog=text)
    flag = parser.add_argument
    flag("--adapter", type=Path, required=True, metavar="FOLDER", help="the adapter")
    flag("--collection", required=True, metavar="NAME", help="the collection, of the sample's documents")
    flag("--seconds", type=console.number(float, 1), default=60.0, help="per round")
    flag("--write", type=Path, metavar="FILE", help="put the table between its marks in this file")
    return parser


if __name__ == "__main__":
    sys.exit(console.run(main))
