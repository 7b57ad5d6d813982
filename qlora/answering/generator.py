"""The LangChain chat model over transformers `generate`: messages in, streamed text out.

It renders messages with the same chat template and tokens as training did (`encode_prompt`), never
echoes the prompt, counts tokens, and passes on exceptions of the generating thread.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import Field

from qlora import machine
from qlora.prompt import encode_prompt

LOOKUP = 10  # tokens; 5 to 10 are equally fast on 2 cores


@dataclass(frozen=True)
class Decoding:
    """The decoding of an answer: greedy at temperature 0, else seeded sampling.

    `first_bias` is added to the logits of its tokens where an answer begins.
    """

    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    first_bias: dict[int, float] = field(default_factory=dict)


class Generator(BaseChatModel):
    """A causal language model with its tokenizer, and the fields of `Decoding`."""

    model: Any
    tokenizer: Any
    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    first_bias: dict[int, float] = {}
    known: dict = Field(default_factory=dict)  # prompts that were read last -> what was read of each

    @property
    def _llm_type(self) -> str:
        return "qlora-generator"

    @property
    def window(self) -> int:
        """The largest number of tokens of prompt and answer together."""
        return self.model.config.max_position_embeddings

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """A context in which the base model answers without its adapter."""
        if not hasattr(self.model, "disable_adapter"):
            yield
            return
        bias, self.first_bias = self.first_bias, {}  # the bias was fitted to the adapter
        self.known.clear()
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.first_bias = bias

    def remember(self, prompts: Sequence[list[int]], read) -> None:
        """Keeps what was read of the prompts, until others are: an answer to one of them goes on from there."""
        self.known.clear()
        self.known.update({tuple(prompt): read.take([n]) for n, prompt in enumerate(prompts)})

    def complete(self, conversations: list[list[dict]]) -> list[str]:
        """The answer to each list of role/content messages, generated as one batch."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in conversations]
        return self.tokenizer.batch_decode(self.generate_ids(prompts), skip_special_tokens=True)

    def complete_each(self, conversations: list[list[dict]]) -> Iterator[list[tuple[int, str]]]:
        """The answers with their places, as many at a time as are ready together: here all of them."""
        yield list(enumerate(self.complete(conversations)))

    def generate_ids(self, prompts: list[list[int]], processors: Sequence[Callable] = (), **options) -> list[list[int]]:
        """New token ids for each prompt, up to and with EOS; prompts are padded on the left.

        `processors` change the logits of every step, before a temperature does.

        A single greedy answer uses prompt lookup (github.com/apoorvumang/prompt-lookup-decoding): the continuation of
        the last two tokens in the prompt is checked in one step, so that a quotation takes several tokens per step.
        """
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        if len(prompts) == 1 and self.temperature == 0 and "stop_strings" not in options:
            options["prompt_lookup_num_tokens"] = LOOKUP  # with stop strings prompt lookup would run past them
        if len(prompts) > 1 or tuple(prompts[0]) not in self.known:
            return self.extend_ids(inputs, processors, **options)
        cache = self.known[tuple(prompts[0])].as_cache()
        with going_on(self.model, cache.get_seq_length()):
            return self.extend_ids(inputs, processors, past_key_values=cache, **options)

    def extend_ids(self, inputs, processors: Sequence[Callable] = (), **options) -> list[list[int]]:
        """New token ids for each row of `input_ids` and `attention_mask`, up to and with EOS."""
        import torch
        from transformers import LogitsProcessorList

        machine.threads().adjust()
        if self.temperature > 0:
            torch.manual_seed(self.seed)
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        ends, start = self.end_tokens(), inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(
                **inputs.to(self.model.device),
                **{"do_sample": False, **options},
                logits_processor=LogitsProcessorList([self.bias_first(start), *processors]),
                max_new_tokens=self.max_new_tokens,
                repetition_penalty=self.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=ends,
            )
        made = [row[start:].tolist() for row in output]
        return [ids[: next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))] for ids in made]

    def end_tokens(self) -> list[int]:
        """The tokens that end an answer: what training ends one with, and what the model itself knows (Llama-3)."""
        known = self.model.generation_config.eos_token_id
        return sorted({self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None})

    def bias_first(self, start: int) -> Callable:
        """A logits processor that adds `first_bias` where answers begin, after `start` tokens."""

        def process(ids, logits):
            if ids.shape[1] == start:
                for token, bias in self.first_bias.items():
                    logits[:, token] += bias
            return logits

        return process

    def _generate(self, messages, stop=None, run_manager=None, **kwargs) -> ChatResult:
        """The answer, generated in the calling thread: another thread takes twice as long on the CPU.

        (With two thread pools on two cores OpenMP no longer waits actively, and the pauses between small matrix
        products dominate.)
        """
        pieces = []

        def say(text: str) -> None:
            pieces.append(text)
            if run_manager:
                run_manager.on_llm_new_token(text, chunk=as_chunk(text))

        usage = self.write(messages, stop, say)
        message = AIMessage(content="".join(pieces), usage_metadata=usage)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(self, messages, stop=None, run_manager=None, **kwargs) -> Iterator[ChatGenerationChunk]:
        """The text in pieces, generated in another thread; then an empty chunk with the token counts."""
        pieces, cancelled = queue.SimpleQueue(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(self.write, messages, stop, pieces.put, cancelled.is_set)
            writing.add_done_callback(lambda _: pieces.put(None))
            try:
                for text in iter(pieces.get, None):
                    chunk = as_chunk(text)
                    if run_manager:
                        run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
            finally:
                cancelled.set()
            yield as_chunk("", usage_metadata=writing.result())

    def write(self, messages, stop, say: Callable[[str], None], is_cancelled=lambda: False) -> dict[str, int]:
        """Passes on the answer piece by piece, until it is complete or cancelled; returns LangChain's token counts."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    say(text)

        prompt = encode_prompt(self.tokenizer, [as_role(message) for message in messages])
        options = {"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}
        (made,) = self.generate_ids(
            [prompt],
            streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=StoppingCriteriaList([lambda ids, scores: torch.full(ids.shape[:1], is_cancelled())]),
            **options,
        )
        return {"input_tokens": len(prompt), "output_tokens": len(made), "total_tokens": len(prompt) + len(made)}


@contextlib.contextmanager
def going_on(model, known: int) -> Iterator[None]:
    """A context in which `generate` reads only what follows the `known` tokens of a cache.

    With prompt lookup transformers 5.23 reads the whole prompt again, as if it followed the cache (_assisted_decoding
    passes no next_sequence_length at first).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    prepare = inner.prepare_inputs_for_generation

    @wraps(prepare)  # whose parameters `generate` looks at
    def prepare_new(ids, next_sequence_length=None, **others):
        return prepare(ids, next_sequence_length=next_sequence_length or ids.shape[1] - known, **others)

    inner.prepare_inputs_for_generation = prepare_new
    try:
        yield
    finally:
        del inner.prepare_inputs_for_generation


def as_chunk(text: str, **options) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=text, **options))


def as_role(message: AnyMessage) -> dict[str, str]:
    """A LangChain message as the role/content dict that chat templates take."""
    role = "system" if isinstance(message, SystemMessage) else "assistant" if isinstance(message, AIMessage) else "user"
    return {"role": role, "content": message.text}
