"""How a question is answered: retriever | prompt | model | check, as one LangChain runnable.

    fill = make_fill(prompt, generator)
    chain = build_chain(find, fill, generator, prompt.refusal, threshold)
    chain.invoke({"question": "...", "searched": "...", "history": ()})["answer"]     # citations.Answer

`answer_batch` takes the same steps for many questions with given passages at a time.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableBranch, RunnableLambda
from langchain_core.runnables.base import coerce_to_runnable

from qlora.answering.citations import Answer, check_answer, refuse
from qlora.prompt import Prompt, as_langchain, fill_prompt

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


def refuses_unread(documents: Sequence[Document], threshold: float | None) -> bool:
    """Whether a question is refused without asking the model: no passage was found, or none is similar enough."""
    return not documents or (threshold is not None and best_score(documents) < threshold)


def build_chain(find, fill: Fill, model: Runnable, refusal: str, threshold: float | None = None) -> Runnable:
    """The chain from {"question", "history", "searched"} to a state that also holds `documents` and `answer`.

    `find(searched)` gives the passages, `model` is any LangChain chat model. Unless the question is refused unread
    (`refuses_unread`), the state also holds the `message` of the model with its token counts.
    """

    def write_prompt(state: dict):
        texts = [document.page_content for document in state["documents"]]
        return as_langchain(fill(state["question"], texts, state["history"]))

    def check(state: dict) -> Answer:
        return check_answer(state["message"].text, state["documents"], refusal)

    generate = (
        assign("prompt", write_prompt) | assign("message", itemgetter("prompt") | model) | assign("answer", check)
    )
    refuse_it = assign("answer", lambda state: refuse(state["documents"], refusal))
    retrieve = assign("documents", itemgetter("searched") | PassageRetriever(find=find))
    return retrieve | RunnableBranch((lambda state: refuses_unread(state["documents"], threshold), refuse_it), generate)


def assign(name: str, step) -> Runnable:
    """The state with one more value, as RunnablePassthrough.assign makes it, but in the calling thread.

    LangChain's own runs every step in a new thread. On the CPU torch then has more threads than cores, which wait for
    each other: a prompt of 170 tokens took 0.45 s instead of 0.25.
    """
    made = coerce_to_runnable(step)
    return RunnableLambda(lambda state, config: {**state, name: made.invoke(state, config)}, name=name)


def answer_batch(pairs: Sequence[tuple[str, Sequence[Document]]], fill: Fill, generator, refusal: str) -> list[Answer]:
    """A checked answer for each (question, passages), generated together."""
    texts = generator.complete([fill(question, [d.page_content for d in found], ()) for question, found in pairs])
    return [check_answer(text, found, refusal) for text, (_, found) in zip(texts, pairs, strict=True)]


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

    def timings(self) -> dict[str, float]:
        """Seconds, rounded to milliseconds; the first token counts from the start of generation."""
        retrieved = self.marks["retrieved"]
        start = self.marks.get("generate", retrieved)  # a question refused unread generates nothing
        end = self.marks.get("generated", start)
        return {
            "retrieve_s": round(retrieved - self.marks["retrieve"], 3),
            "first_token_s": round(self.marks.get("first_token", end) - start, 3),
            "generate_s": round(end - start, 3),
        }
