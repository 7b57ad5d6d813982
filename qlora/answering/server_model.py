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
from qlora.prompt import as_langchain, encode_prompt

WINDOW = 4096  # Llama-2's; only vLLM reports its own
RETRIES = 5  # of a request; the SDK waits longer each time, or as long as the server asks for
NO_KEY = "none"  # the SDK demands one, a local server does not


class ServerModel(BaseChatOpenAI):
    """Not ChatOpenAI, which renames max_tokens to a name that older servers do not know."""

    tokenizer: Any
    window: int
    at_once: int = 8  # requests, in `complete_each`
    others: frozenset[str] = frozenset()  # the server's other models
    _warned: bool = PrivateAttr(default=False)

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens

    def without_adapter(self) -> contextlib.AbstractContextManager:
        """A context that changes nothing: the server has one model."""
        return contextlib.nullcontext()

    def complete_each(self, conversations: list[list[dict]]) -> Iterator[list[tuple[int, str]]]:
        """The answers to lists of role/content messages with their places, each as soon as it is there.

        `at_once` of them are asked at the same time. Raises UserError when one of them fails after all retries.
        """
        asked = [as_langchain(messages) for messages in conversations]
        for place, message in self.batch_as_completed(asked, config={"max_concurrency": self.at_once}):
            yield [(place, message.text)]

    @property
    def _llm_type(self) -> str:
        return "qlora-server-model"

    def _stream(self, messages, *args, **kwargs) -> Iterator[ChatGenerationChunk]:
        with explaining(self.openai_api_base, self.model_name):
            for chunk in super()._stream(messages, *args, **kwargs):
                yield chunk
                self.check_name((chunk.generation_info or {}).get("model_name"))  # of the last one
                if usage := chunk.message.usage_metadata:
                    self.compare_prompt(messages, usage["input_tokens"])

    def check_name(self, name: str | None) -> None:
        """Raises UserError when another model of the server answers. Some servers name a file instead of a model."""
        if name in self.others:
            what = f"{self.model_name} was asked, and {name} answers"
            raise fail(what, self.openai_api_base, "check which models the server has loaded")

    def compare_prompt(self, messages: list[AnyMessage], counted: int) -> None:
        """Warns once when the server's chat template makes other tokens than the adapter's."""
        expected = len(encode_prompt(self.tokenizer, [as_role(message) for message in messages]))
        if counted not in (0, expected) and not self._warned:
            self._warned = True
            note(
                f"The server made {counted} tokens of a prompt that has {expected} in training: its chat template "
                "differs. Start it with the adapter's chat_template.jinja (vLLM: --chat-template FILE)"
            )


def connect(url: str, model: str | None, tokenizer, decoding: Decoding, at_once: int = 8) -> ServerModel:
    """The server's model of that name, or its only one.

    `first_bias` is not sent: the protocol has only biases that hold for every token of the answer, not for the first.
    Raises UserError when the server cannot be reached, refuses the key, or has several models and none is named.
    """
    import httpx

    key = settings.get("QLORA_API_KEY") or NO_KEY
    name, window, others = choose_model(url, key, model)
    note(f"{name} at {url}")
    if decoding.first_bias:
        note("The refusal bias that training fitted is not used: a server would add it to every token of the answer")
    note_remote(url)
    extra = {"repetition_penalty": decoding.repetition_penalty} if decoding.repetition_penalty != 1 else {}
    return ServerModel(
        base_url=url,
        api_key=key,
        model=name,
        tokenizer=tokenizer,
        window=window,
        at_once=at_once,
        others=others,
        max_retries=RETRIES,
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


def choose_model(url: str, key: str, name: str | None) -> tuple[str, int, frozenset[str]]:
    """Name and window of the model, the one named or the server's only one, and the names of the others.

    vLLM tells the window of a base model alone: that of a LoRA module is its parent's.
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
    card = cards.get(name)
    family = [card, cards.get(getattr(card, "parent", None))]
    windows = [window for one in family if (window := getattr(one, "max_model_len", None))]
    return name, windows[0] if windows else WINDOW, find_others(name, cards)


def find_others(name: str, cards: dict) -> frozenset[str]:
    """The server's other models. One has several names: an alias and its version, or those that vLLM was given."""
    root = getattr(cards.get(name), "root", None)
    others = {one for one, card in cards.items() if not one.startswith(name)}
    return frozenset(one for one in others if root is None or getattr(cards[one], "root", None) != root)


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
        404: "check --base-url (it ends with /v1) and --model; a server that refused an adapter says why in its log",
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
