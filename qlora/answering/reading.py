"""Passages read alone: how much rather the model would begin an answer from each than refuse.

    reader = Reader(generator, fill, prompt)
    reader.odds("Who signs form B7?", documents)     # [4.1, -2.3]: log-odds of an answer

Training taught the model to refuse where a passage does not answer, so the first token of the response knows which
passage does. The rules at the beginning are computed once, and the generator goes on from what was read.
"""

from collections.abc import Sequence

from langchain_core.documents import Document

from qlora.answering.generator import Generator
from qlora.answering.shared_beginnings import Beginning, rules_of_all
from qlora.prompt import Prompt, encode_prompt


class Reader:
    """A model that reads; `fill` makes the messages that `chain` asks with."""

    def __init__(self, generator: Generator, fill, prompt: Prompt):
        self.generator, self.fill = generator, fill
        self.refusal = generator.tokenizer(prompt.refusal, add_special_tokens=False).input_ids[0]
        self.beginning = Beginning(generator, rules_of_all(generator.tokenizer, prompt))

    def odds(self, question: str, documents: Sequence[Document], history: Sequence[dict] = ()) -> list[float]:
        """The log-odds of the likeliest first token of an answer against that of the refusal, for each passage."""
        from qlora import machine

        machine.threads().adjust()
        tokenizer = self.generator.tokenizer
        asked = [self.fill(question, [document.page_content], history) for document in documents]
        prompts = [encode_prompt(tokenizer, messages) for messages in asked]
        read = self.beginning.read(prompts)
        self.generator.remember(prompts, read)
        logits = read.logits.float().clone()
        refusing = logits[:, self.refusal].clone()
        logits[:, self.refusal] = -float("inf")
        return (logits.max(-1).values - refusing).tolist()
