"""A turn of a conversation: a question, its checked answer, and how a person or a program sees it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from langchain_core.documents import Document

from qlora.answering.chain import Stopwatch
from qlora.answering.citations import Answer
from qlora.console import json_line, note, printable, say
from qlora.retrieval.documents import place
from qlora.words import clean


@dataclass
class Turn:
    """A question with its answer, the passages behind it, its tokens and times."""

    question: str
    answer: Answer
    searched: str  # the question as it was searched, without references back
    timings: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict:
        return {
            "question": self.question,
            "answer": self.answer.text,
            "refused": self.answer.refused,
            "supported": self.answer.is_supported,
            **self.answer.decided,
            "unsupported": self.answer.unsupported,
            "citations": [cited.as_json() for cited in self.answer.citations],
            "passages": [cited.as_json() for cited in self.answer.passages],
            "timings": self.timings,
            "tokens": self.tokens,
        }


def answer_question(chain, question: str, history: tuple = (), searched: str | None = None) -> Turn:
    """Runs the chain once, with a stopwatch."""
    watch, question, searched = Stopwatch(), clean(question), clean(searched or question)
    given = {"question": question, "history": history, "searched": searched}
    state = chain.invoke(given, config={"callbacks": [watch]})
    usage = ("message" in state and state["message"].usage_metadata) or {"input_tokens": 0, "output_tokens": 0}
    tokens = {"prompt": usage["input_tokens"], "completion": usage["output_tokens"]}
    return Turn(question, state["answer"], searched, watch.timings(), tokens)


def print_turn(turn: Turn, show_question: bool = True) -> None:
    """Prints the answer on stdout, then each cited passage: its place, its support of the answer, its sentence."""
    answer = turn.answer
    if show_question:
        say(f"\nQ: {turn.question}")
    say(f"A: {answer.text}")
    for text in answer.unsupported:
        why = "not in the cited passages" if answer.citations else "it cites no passage"
        say(f"   ! {why}: {text}")
    for cited in answer.citations:
        say(f"   [{cited.n}] {place(cited.document.metadata)} ({cited.support:.0%} of the words)")
        say(indent(cited.span, "       "))
    if "confidence" in answer.decided and not answer.refused:
        say(f"   confidence: {answer.decided['confidence']:.0%}")
    if answer.unknown:
        note(f"{answer.unknown} citations of passages that were not given were removed")
    if answer.refused and answer.passages:
        nearest = ", ".join(dict.fromkeys(cited.document.metadata["source"] for cited in answer.passages))
        say(f"   (nearest documents: {nearest})")


def write_trace(path: Path, line: dict) -> None:
    """Appends a line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(line) + "\n")


def print_passages(documents: Sequence[Document], explain: bool) -> None:
    """Prints each passage with its score and place; `explain`: and its rank in each leg of the search."""
    for n, document in enumerate(documents, 1):
        metadata = document.metadata
        say(f"[{n}] {metadata['score']:.3f}  {place(metadata)}")
        if explain:
            say(f"    {describe_ranks(metadata['ranks'])}")
        say(f"{indent(document.page_content)}\n")
    if not documents:
        note("No passages found")


def describe_ranks(ranks: dict[str, int | None]) -> str:
    """`dense rank 1, lexical rank -`: the place of a passage in each leg of the search."""
    return ", ".join(f"{leg} rank {rank or '-'}" for leg, rank in ranks.items())


def indent(text: str, margin: str = "    ") -> str:
    """The text without control characters, as a paragraph with a margin."""
    return textwrap.fill(" ".join(printable(text).split()), 100, initial_indent=margin, subsequent_indent=margin)
