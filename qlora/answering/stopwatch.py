"""How long retrieval, the first token and generation take, taken from LangChain's own callbacks."""

import time

from langchain_core.callbacks import BaseCallbackHandler


class Stopwatch(BaseCallbackHandler):
    """Notes when each event of one chain run happened."""

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
