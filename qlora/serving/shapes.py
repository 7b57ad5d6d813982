"""OpenAI's shapes: requests as clients send them, answers and errors as they expect them.

Beside OpenAI's fields an answer has `citations`, `unsupported`, `refused`, `nearest` and, with a ranking, `confidence`.
"""

import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qlora.answering.conversation import Turn
from qlora.retrieval.documents import UNITS

LONGEST = 20_000  # characters of a question


class Message(BaseModel):
    """A message; its content is a text, or a list of parts of which the texts count."""

    model_config = ConfigDict(extra="ignore")
    role: str
    content: str | list[dict] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")
        return self.content or ""


class ChatRequest(BaseModel):
    """What POST /v1/chat/completions takes; other fields of OpenAI's are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    max_completion_tokens: int | None = Field(None, ge=1, le=4096)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    n: int = Field(1, ge=1, le=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class SearchRequest(BaseModel):
    """What POST /search takes."""

    question: str = Field(min_length=1, max_length=LONGEST)
    top_k: int = Field(3, ge=1, le=50)


class Feedback(BaseModel):
    """What POST /feedback takes: a judgement of an answer, and what would have been right."""

    question: str = Field(min_length=1, max_length=LONGEST)
    answer: str = Field("", max_length=LONGEST)
    model: str = ""
    rating: str = Field(pattern="^(good|bad)$")
    right_answer: str | None = Field(None, max_length=LONGEST)
    not_in_documents: bool = False
    right_passage: str | None = None
    passages: list[str] = Field(default_factory=list, max_length=50)


# ------------------------------------------------------------------------------- answers


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def describe_answer(turn: Turn) -> dict:
    """The fields beside OpenAI's."""
    answer = turn.answer
    sources = dict.fromkeys(cited.document.metadata["source"] for cited in answer.passages)
    return {
        "citations": [describe_citation(cited, answer) for cited in answer.citations],
        "unsupported": answer.unsupported,
        "refused": answer.refused,
        "nearest": list(sources) if answer.refused else [],
        **answer.decided,
    }


def describe_citation(cited, answer) -> dict:
    """Where a cited passage is, and the sentence of it that supports the answer."""
    metadata = cited.document.metadata
    return {
        "n": cited.n,
        "source": metadata["source"],
        "heading": metadata.get("heading"),
        **{unit: metadata[unit] for unit in (*UNITS, "last_page") if unit in metadata},
        "passage_id": cited.document.id,
        "sentence": cited.span,
        "score": metadata["score"],
        "supported": any(one.is_supported for one in answer.statements if cited.n in one.cites),
    }


def completion(name: str, model: str, turn: Turn) -> dict:
    """A whole answer: OpenAI's chat.completion."""
    message = {"role": "assistant", "content": turn.answer.text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    head = {"id": name, "object": "chat.completion", "created": int(time.time()), "model": model}
    return {**head, "choices": [choice], "usage": usage(turn), **describe_answer(turn)}


def chunk(name: str, model: str, delta: dict, finish: str | None = None, **others) -> dict:
    """A piece of an answer: OpenAI's chat.completion.chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    head = {"id": name, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return {**head, "choices": [choice], **others}


def usage(turn: Turn) -> dict[str, int]:
    prompt, written = turn.tokens.get("prompt", 0), turn.tokens.get("completion", 0)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def error(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
