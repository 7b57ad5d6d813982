"""How a question is answered: retriever | ranker | prompt | model | check, as one LangChain runnable.

    fill = make_fill(prompt, generator)
    chain = build_chain(Finding(search, top_k), fill, generator, prompt.refusal)
    chain.invoke({"question": "...", "searched": "...", "history": ()})["answer"]     # citations.Answer

`answer_each` takes the same steps for many questions with given passages at a time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import itemgetter

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda
from langchain_core.runnables.base import coerce_to_runnable

from qlora.answering.citations import Answer, check_answer, refuse
from qlora.answering.ranker import AMONG, Ranker
from qlora.answering.ranking import Ranking
from qlora.answering.reading import Reader
from qlora.answering.spelling import spell_as
from qlora.prompt import Prompt, as_langchain, fill_prompt
from qlora.retrieval.reranker import open_reranker

DOUBTED = "doubted"  # tag of a run of the model whose answer may become a refusal when it is checked
Asked = tuple[str, Sequence[Document]]  # a question and its passages
Fill = Callable[[str, Sequence[str], Sequence[dict]], list[dict]]  # question, passages, history -> messages


class PassageRetriever(BaseRetriever):
    """The passages of `find(question)`, with scores and ranks, which `as_retriever` loses."""

    find: Callable[[str], list[Document]]

    def _get_relevant_documents(self, query: str, *, run_manager) -> list[Document]:
        return self.find(query)


def make_fill(prompt: Prompt, generator) -> Fill:
    """fill(question, passages, history) -> messages that leave room for the answer in the generator's window."""
    return partial(fill_prompt, generator.tokenizer, prompt, generator.window - generator.max_new_tokens)


def best_score(documents: Sequence[Document]) -> float:
    """The similarity of the best passage; -1, the lowest possible, without passages."""
    return max((document.metadata["score"] for document in documents), default=-1.0)


def open_ranker(ranking: Ranking | None, prompt=None, generator=None, bias=0.0, keeps_going=False) -> Ranker | None:
    """What puts passages in order: a cross-encoder, the model that reads them, or both; None: the search alone."""
    if not ranking:
        return None
    score = open_reranker(ranking.scored_by) if ranking.scored_by else None
    reader = Reader(generator, make_fill(prompt, generator), prompt) if ranking.reads else None
    return Ranker(ranking, reader, score, bias, keeps_going)


@dataclass(frozen=True)
class Finding:
    """How the passages of a question are found and put in order, and when they are found wanting."""

    search: Callable[[str, int], list[Document]]  # the best passages for a text, best first
    top_k: int
    ranker: Ranker | None = None
    threshold: float | None = None  # the similarity that the best passage must reach, where no confidence is known

    @property
    def depth(self) -> int:
        """How many passages are searched for."""
        return max(self.top_k, AMONG) if self.ranker else self.top_k

    def rank(self, question: str, found: list[Document], history: Sequence[dict] = ()) -> list[Document]:
        """The passages as the model gets them, but all of them."""
        return self.ranker(question, found, history) if self.ranker else found

    def find(self, question: str, k: int) -> list[Document]:
        """The `k` best passages for a question that stands alone."""
        return self.rank(question, self.search(question, max(k, self.depth)))[:k]

    def refuses(self, documents: Sequence[Document]) -> bool:
        """Whether a question is refused without an answer of the model: by the confidence, where there is one, else by
        the similarity."""
        if is_decided(documents):
            return documents[0].metadata["confidence"] < self.ranker.ranking.threshold
        return refuses_unread(documents, self.threshold)


def refuses_unread(documents: Sequence[Document], threshold: float | None) -> bool:
    """Whether no passage was found, or none is similar enough."""
    return not documents or (threshold is not None and best_score(documents) < threshold)


def drop_confidence(documents: Sequence[Document]) -> list[Document]:
    """The passages as if no confidence were known."""
    kept = [{name: value for name, value in d.metadata.items() if name != "confidence"} for d in documents]
    return [Document(d.page_content, metadata=metadata, id=d.id) for d, metadata in zip(documents, kept, strict=True)]


def is_decided(documents: Sequence[Document]) -> bool:
    """Whether a confidence decides on refusing; else the model itself does."""
    return bool(documents) and "confidence" in documents[0].metadata


def is_doubted(documents: Sequence[Document]) -> bool:
    """Whether a confidence decided to answer where the model would rather have refused."""
    return is_decided(documents) and documents[0].metadata.get("odds", 0.0) < 0


def build_chain(finding: Finding, fill: Fill, model: Runnable, refusal: str, stop: Sequence[str] = ()) -> Runnable:
    """The chain from {"question", "history", "searched"} to a state that also holds `documents` and `answer`.

    `model` is any LangChain chat model. Unless the question is refused (`Finding.refuses`), the state also holds the
    `message` of the model with its token counts.
    """

    def rank(state: dict) -> list[Document]:
        return finding.rank(state["question"], state["documents"], state["history"])[: finding.top_k]

    def write_prompt(state: dict):
        texts = [document.page_content for document in state["documents"]]
        return as_langchain(fill(state["question"], texts, state["history"]))

    def answer(state: dict, config):
        chosen = unrefusing(model, state["documents"], refusal)
        tags = [DOUBTED] if is_doubted(state["documents"]) else []
        asked = chosen.with_config(tags=tags)
        return (asked.bind(stop=list(stop)) if stop else asked).invoke(state["prompt"], config)

    def check(state: dict) -> Answer:
        return finish_answer(state["message"].text, state["question"], state["documents"], refusal)

    generate = assign("prompt", write_prompt) | assign("message", RunnableLambda(answer)) | assign("answer", check)
    refuse_it = assign("answer", lambda state: refuse(state["documents"], refusal))
    search = PassageRetriever(find=partial(finding.search, k=finding.depth))
    retrieve = assign("documents", itemgetter("searched") | search) | assign("documents", rank)
    return retrieve | RunnableBranch((lambda state: finding.refuses(state["documents"]), refuse_it), generate)


def unrefusing(model, documents: Sequence[Document], refusal: str):
    """The model that answers from the passages: where a confidence has decided, one that does not refuse any more."""
    if not (is_decided(documents) and hasattr(model, "first_bias")):
        return model
    first = model.tokenizer(refusal, add_special_tokens=False).input_ids[0]
    return model.model_copy(update={"first_bias": {first: -float("inf")}})


def assign(name: str, step) -> Runnable:
    """The state with one more value, as RunnablePassthrough.assign makes it, but in the calling thread.

    LangChain's own runs every step in a new thread. On the CPU torch then has more threads than cores, which wait for
    each other: a prompt of 170 tokens took 0.45 s instead of 0.25.
    """
    made = coerce_to_runnable(step)
    return RunnableLambda(lambda state, config: {**state, name: made.invoke(state, config)}, name=name)


def answer_batch(pairs: Sequence[Asked], fill: Fill, generator, refusal: str) -> list[Answer]:
    """A checked answer for each (question, passages), generated together."""
    answers = dict(chain.from_iterable(answer_each(pairs, fill, generator, refusal)))
    return [answers[n] for n in range(len(pairs))]


def answer_each(pairs: Sequence[Asked], fill: Fill, generator, refusal: str) -> Iterator[list[tuple[int, Answer]]]:
    """Checked answers for (question, passages) with their places in `pairs`, as many at a time as are ready."""
    for decided in (False, True):
        part = [n for n, (_, found) in enumerate(pairs) if is_decided(found) == decided]
        if part:
            model = unrefusing(generator, pairs[part[0]][1], refusal)
            asked = [fill(pairs[n][0], [d.page_content for d in pairs[n][1]], ()) for n in part]
            for ready in model.complete_each(asked):
                yield [(part[n], finish_answer(text, *pairs[part[n]], refusal)) for n, text in ready]


def finish_answer(text: str, question: str, documents: Sequence[Document], refusal: str) -> Answer:
    """What the model wrote, spelled as question and passages are, and checked.

    A refusal where the model would rather have refused and the passages do not support what it wrote instead. Of the
    sample's held-out rows that are 11 answers: 10 to questions that the passages do not answer, and 1 that is wrong.
    """
    answer = check_answer(spell_as(text, known_texts(question, documents, refusal)), documents, refusal)
    return refuse(documents, refusal) if is_doubted(documents) and answer.unsupported else answer


def known_texts(question: str, documents: Sequence[Document], refusal: str) -> list[str]:
    """The texts whose words an answer may have."""
    return [question, refusal, *(document.page_content for document in documents)]


# ------------------------------------------------------------------------------- time


class Stopwatch(BaseCallbackHandler):
    """The times of the events of one run of the chain, by LangChain's callbacks."""

    def __init__(self):
        self.marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        self.marks.setdefault(name, time.perf_counter())

    def on_retriever_start(self, *args, **kwargs):
        self.mark("retrieve")

    def on_retriever_end(self, *args, **kwargs):
        self.mark("retrieved")

    def on_chat_model_start(self, *args, **kwargs):
        self.mark("generate")

    def on_llm_new_token(self, *args, **kwargs):
        self.mark("first_token")

    def on_llm_end(self, *args, **kwargs):
        self.mark("generated")

    def on_chain_end(self, *args, **kwargs):
        self.marks["end"] = time.perf_counter()  # of the last step so far

    def timings(self) -> dict[str, float]:
        """Seconds, rounded to milliseconds; the first token counts from the start of generation."""
        retrieved = self.marks["retrieved"]
        start = self.marks.get("generate", self.marks["end"])  # a question that is refused generates nothing
        end = self.marks.get("generated", start)
        return {
            "retrieve_s": round(retrieved - self.marks["retrieve"], 3),
            "rank_s": round(start - retrieved, 3),
            "first_token_s": round(self.marks.get("first_token", end) - start, 3),
            "generate_s": round(end - start, 3),
        }
