"""The LangChain chat model over transformers `generate`: messages in, streamed text out.

It renders messages with the same chat template and tokens as training did (`encode_prompt`), never
echoes the prompt, counts tokens, and passes on exceptions of the generating thread.
"""

import threading
from collections.abc import Iterator
from typing import Any

from langchain.messages import AIMessage, AIMessageChunk, AnyMessage, SystemMessage
from langchain_core.language_models.chat_models import BaseChatModel, generate_from_stream
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from qlora.prompt import encode_prompt


class Generator(BaseChatModel):
    """A causal language model with its tokenizer; greedy unless `temperature` is above 0."""

    model: Any
    tokenizer: Any
    max_new_tokens: int = 96
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def _llm_type(self) -> str:
        return "qlora-generator"

    @property
    def window(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.model.config.max_position_embeddings

    def _generate(self, messages, stop=None, run_manager=None, **kwargs) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(self, messages, stop=None, run_manager=None, **kwargs) -> Iterator[ChatGenerationChunk]:
        """Text as it is generated, then an empty chunk with the token counts."""
        from transformers import TextIteratorStreamer

        prompt = encode_prompt(self.tokenizer, [as_role(message) for message in messages])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        worker = Worker(self, prompt, streamer, stop)
        worker.start()
        try:
            for text in streamer:
                if text:
                    chunk = ChatGenerationChunk(message=AIMessageChunk(content=text))
                    if run_manager:
                        run_manager.on_llm_new_token(text, chunk=chunk)
                    yield chunk
        finally:
            worker.cancelled.set()
            worker.join()
        if worker.error:
            raise worker.error
        usage = {"input_tokens": len(prompt), "output_tokens": worker.completion}
        usage["total_tokens"] = sum(usage.values())
        yield ChatGenerationChunk(message=AIMessageChunk(content="", usage_metadata=usage))


class Worker(threading.Thread):
    """Runs `generate` beside the reader of its streamer; `error` holds what it raised."""

    def __init__(self, generator: Generator, prompt: list[int], streamer, stop: list[str] | None):
        super().__init__(daemon=True)
        self.generator, self.prompt, self.streamer, self.stop = generator, prompt, streamer, stop
        self.cancelled = threading.Event()
        self.completion = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.completion = self.generate()
        except BaseException as error:
            self.error = error
        finally:
            self.streamer.end()

    def generate(self) -> int:
        """Feeds the streamer; the number of tokens generated, EOS included."""
        import torch
        from transformers import StoppingCriteriaList

        maker = self.generator
        ids = torch.tensor([self.prompt], device=maker.model.device)
        sampling = {"do_sample": False}
        if maker.temperature > 0:
            torch.manual_seed(maker.seed)
            sampling = {"do_sample": True, "temperature": maker.temperature, "top_p": maker.top_p}
        with torch.inference_mode():
            output = maker.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=maker.max_new_tokens,
                repetition_penalty=maker.repetition_penalty,
                pad_token_id=maker.tokenizer.pad_token_id,
                eos_token_id=maker.tokenizer.eos_token_id,
                stop_strings=self.stop,
                tokenizer=maker.tokenizer if self.stop else None,
                stopping_criteria=StoppingCriteriaList([self.is_cancelled]),
                streamer=self.streamer,
                **sampling,
            )
        return output.shape[1] - len(self.prompt)

    def is_cancelled(self, input_ids, scores, **kwargs):
        import torch

        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


def as_role(message: AnyMessage) -> dict[str, str]:
    """A LangChain message as the role/content dict that chat templates take."""
    role = "system" if isinstance(message, SystemMessage) else "assistant" if isinstance(message, AIMessage) else "user"
    return {"role": role, "content": message.text}
