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

    def complete(self, conversations: list[list[dict]]) -> list[str]:
        """The answer to each list of role/content messages, generated as one batch."""
        prompts = [encode_prompt(self.tokenizer, messages) for messages in conversations]
        return self.tokenizer.batch_decode(self.generate_ids(prompts), skip_special_tokens=True)

    def generate_ids(self, prompts: list[list[int]], **options) -> list[list[int]]:
        """New token ids for each prompt, up to and with EOS; prompts are padded on the left."""
        import torch

        if self.temperature > 0:
            torch.manual_seed(self.seed)
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        end = self.tokenizer.eos_token_id
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(
                **inputs.to(self.model.device),
                **{"do_sample": False, **options},
                max_new_tokens=self.max_new_tokens,
                repetition_penalty=self.repetition_penalty,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=end,
            )
        made = [row[inputs["input_ids"].shape[1] :].tolist() for row in output]
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in made]

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
        from transformers import StoppingCriteriaList

        options = {"stop_strings": self.stop, "tokenizer": self.generator.tokenizer} if self.stop else {}
        criteria = StoppingCriteriaList([self.is_cancelled])
        made = self.generator.generate_ids([self.prompt], streamer=self.streamer, stopping_criteria=criteria, **options)
        return len(made[0])

    def is_cancelled(self, input_ids, scores, **kwargs):
        import torch

        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), device=input_ids.device)


def as_role(message: AnyMessage) -> dict[str, str]:
    """A LangChain message as the role/content dict that chat templates take."""
    role = "system" if isinstance(message, SystemMessage) else "assistant" if isinstance(message, AIMessage) else "user"
    return {"role": role, "content": message.text}
