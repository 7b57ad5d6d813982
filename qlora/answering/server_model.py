"""The LangChain chat model over an OpenAI-compatible server, with the adapter's prompt and token counts.

vLLM with a LoRA module, `transformers serve`, llama.cpp and Ollama speak this protocol. The server applies its
own chat template, which must be the adapter's: both token counts are compared.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from langchain_core.messages import AnyMessage
from langchain_core.outputs import ChatGenerationChunk
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import PrivateAttr

from qlora import settings
from qlora.answering.generator import Decoding, as_role
from qlora.console import UserError, fail, note
from qlora.prompt import encode_prompt

WINDOW = 4096  # Llama-2's; only vLLM reports its own
NO_KEY = "none"  # the SDK demands one, a local server does not


class ServerModel(BaseChatOpenAI):
    """Not ChatOpenAI, which renames max_tokens to a name that older servers do not know."""

    tokenizer: Any
    window: int
    _warned: bool = PrivateAttr(default=False)

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens

    def without_adapter(self) -> contextlib.AbstractContextManager:
        """A context that changes nothing: the server has one model."""
        return contextlib.nullcontext()

    @property
    def _llm_type(self) -> str:
        return "qlora-server-model"

    def _stream(self, messages, *args, **kwargs) -> Iterator[ChatGenerationChunk]:
        with explaining(self.openai_api_base, self.model_name):
            for chunk in super()._stream(messages, *args, **kwargs):
                yield chunk
                if usage := chunk.message.usage_metadata:
                    self.compare_prompt(messages, usage["input_tokens"])

    def compare_prompt(self, messages: list[AnyMessage], counted: int) -> None:
        """Warns once when the server's chat template makes other tokens than the adapter's."""
        expected = len(encode_prompt(self.tokenizer, [as_role(message) for message in messages]))
        if counted not in (0, expected) and not self._warned:
            self._warned = True
            note(
                f"The server made {counted} tokens of a prompt that has {expected} in training: its chat template "
                "differs. Start it with the adapter's chat_template.jinja (vLLM: --chat-template FILE)"
            )


def connect(url: str, model: str | None, tokenizer, decoding: Decoding) -> ServerModel:
    """The server's model of that name, or its only one.

    `first_bias` is added to the logits of its tokens at every position: the protocol has no other way.
    Raises UserError when the server cannot be reached, refuses the key, or has several models and none is named.
    """
    import httpx

    key = settings.get("QLORA_API_KEY") or NO_KEY
    name, window = choose_model(url, key, model)
    note(f"{name} at {url}")
    note_remote(url)
    extra = {"repetition_penalty": decoding.repetition_penalty} if decoding.repetition_penalty != 1 else {}
    extra |= {"logit_bias": decoding.first_bias} if decoding.first_bias else {}
    return ServerModel(
        base_url=url,
        api_key=key,
        model=name,
        tokenizer=tokenizer,
        window=window,
        max_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        extra_body=extra or None,
        streaming=True,
        stream_usage=True,
        timeout=httpx.Timeout(None, connect=10),  # a slow machine may take minutes
    )


def note_remote(url: str) -> None:
    """Says so when texts leave this machine."""
    if urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1"):
        note(f"Questions and passages are sent to {url}")


def choose_model(url: str, key: str, name: str | None) -> tuple[str, int]:
    """Name and window of the model: the one named, else the server's only one.

    A named one may be missing from the list: `transformers serve` lists its cache, and loads any model by name.
    """
    from openai import APIStatusError, OpenAI

    cards = {}
    with explaining(url, name), OpenAI(base_url=url, api_key=key, timeout=10, max_retries=1) as client:
        try:
            cards = {card.id: card for card in client.models.list()}
        except APIStatusError as error:
            if not name or error.status_code in (401, 403):
                raise
    if not name and len(cards) != 1:
        what = f"the server lists {len(cards)} models" if cards else "the server lists no model"
        raise fail(what, url, f"name one with --model NAME{': ' + ', '.join(sorted(cards)) if cards else ''}")
    name = name or next(iter(cards))
    return name, getattr(cards.get(name), "max_model_len", None) or WINDOW


def check_url(url: str) -> None:
    """Raises UserError unless it is an http address without a password, which would be printed."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise fail(f"not the address of a server: {url}", "--base-url", "write http://HOST:PORT/v1")
    if parts.username or parts.password:
        raise fail("a password in the address", "--base-url", "take it out; a key goes into QLORA_API_KEY")


@contextlib.contextmanager
def explaining(url: str, model: str | None) -> Iterator[None]:
    """Turns the errors of the SDK into a UserError."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise fail("the server cannot be reached", url, "start it, or check --base-url (it ends with /v1)") from error
    except openai.APIStatusError as error:
        raise explain_status(error, url, model) from error
    except openai.APIError as error:
        raise fail(f"the server failed ({said(error)})", url, "read its log") from error


def explain_status(error, url: str, model: str | None) -> UserError:
    """What an HTTP status of the server means for the user."""
    fixes = {
        400: "a long context? give a smaller --top-k",
        401: "set QLORA_API_KEY to a key that the server takes",
        403: "set QLORA_API_KEY to a key that may use the model",
        404: "check --base-url (it ends with /v1) and --model",
        429: "wait, and ask again",
    }
    what = f"the server refused with {error.status_code} ({said(error)})"
    return fail(what, f"{url} {model or ''}".strip(), fixes.get(error.status_code, "read the server's log"))


def said(error: Exception) -> str:
    """The server's message, as one line without the key."""
    body = getattr(error, "body", None)
    words = " ".join(str(body.get("message", body) if isinstance(body, dict) else error).split())
    key = settings.get("QLORA_API_KEY")
    return (words.replace(key, "QLORA_API_KEY") if key else words)[:200]
