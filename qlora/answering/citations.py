"""Checked citations: every `[n]` must name a given passage, and every sentence is compared with the passages
that it cites."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.documents import Document

from qlora.prompt import Prompt
from qlora.refusal import is_refusal
from qlora.words import FULL_STOPS, MARK, MARKS, SENTENCE_END, SPACELESS

MARKS_AFTER = re.compile(rf"([{FULL_STOPS}])((?:\s*\[\d+\])+)")  # "so. [1] Then" cites for the sentence before
RUN = re.compile(rf"[{SPACELESS}{MARKS}]{{2,}}")  # of a script without spaces between words
WORD = re.compile(
    rf"[{SPACELESS}][{SPACELESS}{MARKS}]*|(?:[^\W{SPACELESS}][{MARKS}]*)+(?:[.,:]\d+)*"
)  # 1,200 and 14:30
QUOTED = re.compile(r"[\"\u201c]([^\"\u201d]+)[\"\u201d]")
EMPTY_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by can do does for from had has have he her his i if in is it its may no not of on "
        "or she so that the their them then there these they this to was were what when where which who will with yes",
    )
)
ENOUGH = 0.6  # share of a sentence's words that must be in a passage that it cites


@dataclass(frozen=True)
class Cited:
    """A passage with its number in the prompt and, if it is cited, how far it supports the answer."""

    n: int
    document: Document
    support: float | None = None  # of the sentences that cite it, the best
    span: str = ""  # the sentence of the passage with most of its words

    def as_json(self) -> dict:
        metadata = self.document.metadata
        return {
            "n": self.n,
            "source": metadata["source"],
            **({"also_in": metadata["also_in"]} if "also_in" in metadata else {}),
            "score": metadata["score"],
            **({"ranks": metadata["ranks"]} if "search" in metadata.get("ranks", ()) else {}),
            "text": self.document.page_content,
            **({"support": self.support, "span": self.span} if self.support is not None else {}),
        }


@dataclass(frozen=True)
class Statement:
    """A sentence of an answer, without its citations."""

    text: str
    cites: tuple[int, ...]  # numbers of passages; those of the whole answer where the sentence has none
    support: float  # share of its words that are in the best of them
    exact: bool  # whether all its numbers and quotations are there word for word

    @property
    def is_supported(self) -> bool:
        return self.exact and self.support >= ENOUGH


@dataclass(frozen=True)
class Answer:
    """A checked answer; `unknown` counts citations of passages that were not given."""

    text: str
    refused: bool
    citations: tuple[Cited, ...]
    passages: tuple[Cited, ...]
    unknown: int
    statements: tuple[Statement, ...] = ()

    @property
    def is_supported(self) -> bool:
        """Whether a cited passage supports at least one sentence."""
        return any(statement.is_supported for statement in self.statements)

    @property
    def decided(self) -> dict:
        """The `confidence` that the answer is right, where a ranking gives one; `unranked`: why it could not."""
        first = self.passages[0].document.metadata if self.passages else {}
        return {name: first[name] for name in ("confidence", "unranked") if name in first}

    @property
    def unsupported(self) -> list[str]:
        return [statement.text for statement in self.statements if not statement.is_supported]


def refuse(documents: Sequence[Document], refusal: str = Prompt.refusal) -> Answer:
    """The refusal, with the passages that did not answer."""
    return Answer(refusal, True, (), tuple(Cited(n, document) for n, document in enumerate(documents, 1)), 0)


def check_answer(text: str, documents: Sequence[Document], refusal: str) -> Answer:
    """The answer with its citations resolved, in order of first mention, and compared with the passages.

    A refusal has no citations.
    """
    if is_refusal(text, refusal):
        return refuse(documents, refusal)
    numbers = [int(number) for number in MARK.findall(text)]
    known = [n for n in dict.fromkeys(numbers) if 1 <= n <= len(documents)]
    clean = MARK.sub(lambda mark: mark[0] if 1 <= int(mark[1]) <= len(documents) else "", text)
    clean = re.sub(r"\s+([.,;:!?]|$)", r"\1", clean).strip()
    texts = [document.page_content for document in documents]
    parts = SENTENCE_END.split(MARKS_AFTER.sub(r"\2\1", clean))
    statements = tuple(compare_statement(part, known, texts) for part in parts if part.strip())
    return Answer(
        text=clean,
        refused=False,
        citations=tuple(support_citation(n, documents[n - 1], statements) for n in known),
        passages=tuple(Cited(n, document) for n, document in enumerate(documents, 1)),
        unknown=len(numbers) - sum(1 <= n <= len(documents) for n in numbers),
        statements=statements,
    )


# ------------------------------------------------------------------------------- support


def compare_statement(part: str, cited: Sequence[int], passages: Sequence[str]) -> Statement:
    """The sentence with its support by the best passage that it cites, or else that the answer cites anywhere."""
    own = tuple(dict.fromkeys(int(number) for number in MARK.findall(part))) or tuple(cited)
    text = re.sub(r"\s+([.,;:!?]|$)", r"\1", MARK.sub("", part)).strip()
    measured = [(measure_support(text, passages[n - 1]), stands_exactly(text, passages[n - 1])) for n in own]
    support, exact = max(measured, key=lambda pair: (pair[1], pair[0]), default=(0.0, False))
    return Statement(text, own, round(support, 3), exact)


def measure_support(text: str, passage: str) -> float:
    """The share of the sentence's words, without function words, that the passage has; 1 for "Yes." and the like."""
    wanted = content_words(text)
    return len(wanted & content_words(passage)) / len(wanted) if wanted else 1.0


def stands_exactly(text: str, passage: str) -> bool:
    """Whether every number and every quotation of the sentence is in the passage."""
    plain = " ".join(passage.lower().split())
    numbers = {word for word in WORD.findall(text) if word[0].isdigit()}
    quotes = [" ".join(quote.lower().split()) for quote in QUOTED.findall(text)]
    return numbers <= set(WORD.findall(passage)) and all(quote in plain for quote in quotes)


def content_words(text: str) -> set[str]:
    """The words without function words; in scripts without spaces, pairs of characters."""
    words = {word for word in WORD.findall(text.lower()) if word not in EMPTY_WORDS}
    runs = {word for word in words if RUN.fullmatch(word)}
    return words - runs | {run[n : n + 2] for run in runs for n in range(len(run) - 1)}


def support_citation(n: int, document: Document, statements: Sequence[Statement]) -> Cited:
    """The citation with its support, and the passage's sentence that shares most words with the citing ones."""
    citing = [statement.text for statement in statements if n in statement.cites]
    support = max((measure_support(text, document.page_content) for text in citing), default=0.0)
    wanted = set().union(*map(content_words, citing))
    sentences = [" ".join(part.split()) for part in SENTENCE_END.split(document.page_content)]
    span = max(sentences, key=lambda sentence: len(wanted & content_words(sentence)))
    return Cited(n, document, round(support, 3), span)
