"""Continuous batching: answers grow together, who is done leaves, and others take the places meanwhile.

    batch = ContinuousBatch(generator, beginning)
    batch.admit([(prompt, take)])       # `take(token)` gets each token, and says whether the answer is complete
    while batch:
        batch.step()                    # a token for every answer

As Orca schedules it (Yu et al., OSDI 2022): a batch of its own for each set of questions would go on as long as the
longest answer. Answers are greedy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora.answering.generator import Generator
from qlora.answering.shared_beginnings import pad_left

Take = Callable[[int], bool]


@dataclass(frozen=True)
class Growing:
    """An answer that is not complete: the tokens of its prompt, and its own so far."""

    ids: list[int]
    take: Take
    processors: Sequence[Callable]


class ContinuousBatch:
    """The answers in work, with one cache for all: a row each, padded on the left."""

    def __init__(self, generator: Generator, beginning: Sequence[int] = ()):
        """`beginning` are the tokens that prompts begin with, as far as they do; they are computed once."""
        import torch
        from transformers import DynamicCache

        self.generator, self.beginning = generator, list(beginning)
        self.rows: list[Growing] = []
        self.cache = self.mask = None
        self.known = DynamicCache()  # of the beginning; never one of a sliding window, whose rows cannot be joined
        if self.beginning:
            ids = torch.tensor([self.beginning], device=generator.model.device)
            ones = torch.ones_like(ids)
            self.read(ids, ones, ones.cumsum(-1) - 1, self.known)

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, asked: Sequence[tuple[list[int], Take]]) -> None:
        """Reads the prompts and takes the first token of each answer; those that it does not end join the batch."""
        import torch
        from transformers import DynamicCache

        if not asked:
            return
        prompts, known = [prompt for prompt, _ in asked], len(self.beginning)
        if any(prompt[:known] != self.beginning for prompt in prompts):
            known = 0
        given = pad_left(self.generator.tokenizer, [prompt[known:] for prompt in prompts])
        given = given.to(self.generator.model.device)
        mask = torch.nn.functional.pad(given["attention_mask"], [known, 0], value=1)
        shared = [[part.expand(len(prompts), -1, -1, -1) for part in pair] for pair in layers_of(self.known)]
        cache = DynamicCache(shared) if known else DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        logits = self.read(given["input_ids"], mask, positions, cache)
        rows = [Growing(list(prompt), take, self.make_processors(len(prompt))) for prompt, take in asked]
        left = [n for n, row in enumerate(rows) if not self.is_complete(row, logits[n : n + 1])]
        if left:
            self.join([rows[n] for n in left], mask[left], [[part[left] for part in pair] for pair in layers_of(cache)])

    def read(self, ids, mask, positions, cache):
        """The logits after the last token of each row; the cache grows by all of them."""
        import torch

        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        with torch.inference_mode():
            return self.generator.model(ids, **given, use_cache=True, logits_to_keep=1).logits[:, -1]

    def make_processors(self, start: int) -> list[Callable]:
        """What changes the logits of an answer that begins after `start` tokens."""
        from transformers import RepetitionPenaltyLogitsProcessor

        penalty = self.generator.repetition_penalty
        return [
            self.generator.bias_first(start),
            *([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []),
        ]

    def join(self, rows: list[Growing], mask, layers: list) -> None:
        """Adds rows with their mask and cache; the shorter side is padded."""
        import torch
        from transformers import DynamicCache

        if self.rows:
            length = max(mask.shape[1], self.mask.shape[1])
            mask = torch.cat([pad(self.mask, length, 1), pad(mask, length, 1)])
            pairs = zip(layers_of(self.cache), layers, strict=True)
            layers = [[join_parts(*parts, length) for parts in zip(*pair, strict=True)] for pair in pairs]
        self.rows, self.cache, self.mask = [*self.rows, *rows], DynamicCache(layers), mask

    def step(self) -> None:
        """One more token for every answer; complete ones leave."""
        import torch

        if not self.rows:
            return
        last = torch.tensor([row.ids[-1:] for row in self.rows], device=self.mask.device)
        places = self.mask.sum(-1, keepdim=True)
        self.mask = torch.cat([self.mask, torch.ones_like(places)], dim=1)
        logits = self.read(last, self.mask, places, self.cache)
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
        """Leaves out the other rows, and what is padding in all that stay."""
        from transformers import DynamicCache

        self.rows = [self.rows[n] for n in numbers]
        if not self.rows:
            self.cache = self.mask = None
            return
        mask = self.mask[numbers]
        used = mask.any(0)
        self.mask = mask[:, used]
        kept = [[part[numbers][:, :, used] for part in pair] for pair in layers_of(self.cache)]
        self.cache = DynamicCache(kept)


def layers_of(cache) -> list[tuple]:
    """(keys, values) of every layer: rows, heads, tokens, size of a head."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def join_parts(first, second, length: int):
    """The rows of both, padded to `length` tokens."""
    import torch

    return torch.cat([pad(first, length, 2), pad(second, length, 2)])


def pad(part, length: int, dim: int):
    """The tensor with zeros before its tokens, which are dimension `dim`."""
    from torch.nn.functional import pad as add

    after = 2 * (part.dim() - 1 - dim) * [0]
    return add(part, [*after, length - part.shape[dim], 0])
