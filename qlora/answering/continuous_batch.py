"""Continuous batching: answers grow together, who is done leaves, and others take the places meanwhile.

    batch = ContinuousBatch(generator, beginning)
    batch.admit(prompt, take)           # `take(token)` gets each token, and says whether the answer is complete
    while batch:
        batch.step()                    # a token for every answer

As Orca schedules it (Yu et al., OSDI 2022): a batch of its own for each set of questions would go on as long as the
longest answer. Answers are greedy.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

from qlora.answering.generator import Generator

Take = Callable[[int], bool]


@dataclass(frozen=True)
class Growing:
    """An answer that is not complete: its prompt's length and all tokens so far."""

    start: int
    ids: list[int]
    take: Take
    processors: Sequence[Callable]


class ContinuousBatch:
    """The answers in work, with one cache for all: a row each, padded on the left."""

    def __init__(self, generator: Generator, beginning: Sequence[int] = ()):
        """`beginning` are the tokens that prompts begin with, as far as they do; they are computed once."""
        from transformers import DynamicCache

        self.generator, self.beginning = generator, list(beginning)
        self.rows: list[Growing] = []
        self.cache = self.mask = None
        self.known = DynamicCache()  # of the beginning; never one of a sliding window, whose rows cannot be joined
        if self.beginning:
            self.read(self.beginning, self.known)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, ids: Sequence[int], cache):
        """The logits after the tokens, which are added to the cache of one row."""
        import torch

        inputs = torch.tensor([ids], device=self.generator.model.device)
        with torch.inference_mode():
            return self.generator.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def admit(self, prompt: list[int], take: Take) -> None:
        """Reads the prompt and takes the answer's first token; unless that ends it, the answer joins the batch."""
        import torch
        from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor

        known = len(self.beginning) if prompt[: len(self.beginning)] == self.beginning else 0
        cache = deepcopy(self.known) if known else DynamicCache()
        logits = self.read(prompt[known:], cache)
        processors = [self.generator.bias_first(len(prompt))]
        if self.generator.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.generator.repetition_penalty))
        row = Growing(len(prompt), list(prompt), take, processors)
        if self.is_complete(row, logits):
            return
        mask = torch.ones(1, len(prompt), dtype=torch.long, device=logits.device)
        if self.rows:
            length = max(len(prompt), self.mask.shape[1])
            joined = [pad(self.mask, length, 1), pad(mask, length, 1)]
            pairs = zip(layers_of(self.cache), layers_of(cache), strict=True)
            cache = DynamicCache([[join(*parts, length) for parts in zip(*pair, strict=True)] for pair in pairs])
            mask = torch.cat(joined)
        self.rows, self.cache, self.mask = [*self.rows, row], cache, mask

    def step(self) -> None:
        """One more token for every answer; complete ones leave."""
        import torch

        if not self.rows:
            return
        last = torch.tensor([row.ids[-1:] for row in self.rows], device=self.mask.device)
        places = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(places)], dim=1)
        given = {"attention_mask": self.mask, "position_ids": places, "past_key_values": self.cache}
        with torch.inference_mode():
            logits = self.generator.model(last, **given, use_cache=True, logits_to_keep=1).logits[:, -1]
        left = [n for n, row in enumerate(self.rows) if not self.is_complete(row, logits[n : n + 1])]
        if len(left) < len(self.rows):
            self.keep(left)

    def is_complete(self, row: Growing, logits) -> bool:
        """Whether the answer is complete with its next token, the likeliest."""
        import torch

        so_far = torch.tensor([row.ids], device=logits.device)
        with torch.inference_mode():
            for process in row.processors:
                logits = process(so_far, logits)
        token = int(logits.argmax())
        row.ids.append(token)
        return row.take(token)

    def keep(self, numbers: list[int]) -> None:
        """Leaves out the other rows, and the padding that all rows have then."""
        from transformers import DynamicCache

        self.rows = [self.rows[n] for n in numbers]
        if not self.rows:
            self.cache = self.mask = None
            return
        self.mask = self.mask[numbers]
        padded = int((self.mask.sum(0) == 0).sum())
        self.mask = self.mask[:, padded:]
        kept = [[part[numbers][:, :, padded:] for part in pair] for pair in layers_of(self.cache)]
        self.cache = DynamicCache(kept)


def layers_of(cache) -> list[tuple]:
    """(keys, values) of every layer: rows, heads, tokens, size of a head."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def join(first, second, length: int):
    """The rows of both, padded to `length` tokens."""
    import torch

    return torch.cat([pad(first, length, 2), pad(second, length, 2)])


def pad(part, length: int, dim: int):
    """The tensor with zeros before its tokens, which are dimension `dim`."""
    from torch.nn.functional import pad as add

    after = 2 * (part.dim() - 1 - dim) * [0]
    return add(part, [*after, length - part.shape[dim], 0])
