"""A turn of a conversation: a question, its checked answer, and how a person or a program sees it."""

import sys
import textwrap
from dataclasses import dataclass, field

from qlora.citations import Answer
from qlora.console import note
from qlora.documents import place
from qlora.stopwatch import Stopwatch


@dataclass
class Turn:
    """A question with its answer, the passages behind it, and what it cost."""

    question: str
    answer: Answer
    timings: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def as_json(self, args) -> dict:
        return {
            "question": self.question,
            "answer": self.answer.text,
            "refused": self.answer.refused,
            "citations": [cited.as_json() for cited in self.answer.citations],
            "passages": [cited.as_json() for cited in self.answer.passages],
            "timings": self.timings,
            "tokens": self.tokens,
            "model": {"base": args.base_model, "adapter": str(args.adapter) if args.adapter else None},
        }


def answer_question(chain, question: str, history: tuple = ()) -> Turn:
    """Runs the chain once, with a stopwatch."""
    watch = Stopwatch()
    state = chain.invoke({"question": question, "history": history}, config={"callbacks": [watch]})
    usage = state["message"].usage_metadata if "message" in state else {"input_tokens": 0, "output_tokens": 0}
    tokens = {"prompt": usage["input_tokens"], "completion": usage["output_tokens"]}
    return Turn(question, state["answer"], watch.timings(), tokens)


def print_turn(turn: Turn, show_question: bool = True) -> None:
    """The answer on stdout, then each passage it cites with source and score."""
    if show_question:
        print(f"\nQ: {turn.question}")
    print(f"A: {turn.answer.text}")
    for cited in turn.answer.citations:
        metadata = cited.document.metadata
        print(f"   [{cited.n}] {place(metadata)} (score {metadata['score']:.2f})")
        print(indent(cited.document.page_content, "       "))
    if turn.answer.unknown:
        note(f"{turn.answer.unknown} citations of passages that were not given were removed")
    if turn.answer.refused and turn.answer.passages:
        nearest = ", ".join(dict.fromkeys(cited.document.metadata["source"] for cited in turn.answer.passages))
        print(f"   (nearest documents: {nearest})")
    sys.stdout.flush()


def describe_ranks(ranks: dict[str, int | None]) -> str:
    """`dense rank 1, lexical rank -`: the place each leg of the search gave a passage."""
    return ", ".join(f"{leg} rank {rank or '-'}" for leg, rank in ranks.items())


def indent(text: str, margin: str = "    ") -> str:
    return textwrap.fill(" ".join(text.split()), 100, initial_indent=margin, subsequent_indent=margin)
