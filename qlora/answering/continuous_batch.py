"""Continuous batching: answers grow together, who is done leaves, and others take the places meanwhile.

    batch = ContinuousBatch(generator, beginning)
    batch.admit([Asked(prompt, take, generator)])   # `take(token)` gets each token, and says whether it was the last
    while batch:
        batch.step()                    # a token for every answer

As Orca schedules it (Yu et al., OSDI 2022): a batch of its own for each set of questions would go on as long as the
longest answer. Answers are greedy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora.answering.generator import Generator
from qlora.answering.shared_beginnings import Beginning, Read, layers_of, read_tokens

Take = Callable[[int], bool]


@dataclass(frozen=True)
class Asked:
    """A prompt that waits for its answer, which has the penalties of its `generator`; `read`, if it was read before."""

    prompt: list[int]
    take: Take
    generator: Generator
    read: Read | None = None


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
        self.generator, self.beginning = generator, Beginning(generator, beginning)
        self.rows: list[Growing] = []
        self.cache = self.mask = None

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, asked: Sequence[Asked]) -> None:
        """Reads the prompts and takes the first token of each answer; those that it does not end join the batch."""
        unread = [one for one in asked if not one.read]
        parts = [([one], one.read) for one in asked if one.read]
        parts += [(unread, self.beginning.read([one.prompt for one in unread]))] if unread else []
        for part, read in parts:
            rows = [Growing(list(one.prompt), one.take, make_processors(one)) for one in part]
            left = [n for n, row in enumerate(rows) if not self.is_complete(row, read.logits[n : n + 1].clone())]
            if left:
                self.join([rows[n] for n in left], read.take(left))

    def join(self, rows: list[Growing], read: Read) -> None:
        """Adds rows with what was read of them; the shorter side is padded."""
        import torch
        from transformers import DynamicCache

        mask, layers = read.mask, read.layers
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
        logits = read_tokens(self.generator.model, last, self.mask, places, self.cache)
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


def make_processors(asked: Asked) -> list[Callable]:
    """What changes the logits of an answer."""
    from transformers import RepetitionPenaltyLogitsProcessor

    penalty = asked.generator.repetition_penalty
    return [
        asked.generator.bias_first(len(asked.prompt)),
        *([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []),
    ]


def join_parts(first, second, length: int):
    """The rows of both, padded to `length` tokens."""
    import torch

    return torch.cat([pad(first, length, 2), pad(second, length, 2)])


def pad(part, length: int, dim: int):
    """The tensor with zeros before its tokens, which are dimension `dim`."""
    from torch.nn.functional import pad as add

    after = 2 * (part.dim() - 1 - dim) * [0]
    return add(part, [*after, length - part.shape[dim], 0])
