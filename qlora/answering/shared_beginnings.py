"""Prompts with a common beginning, such as questions about one passage: the beginning is computed once.

    generate_groups(generator, [[prompt, prompt], [prompt]])       # new tokens of each prompt, in order
    Beginning(generator, tokens).read([prompt, prompt])            # what comes next, for many calls

Rows are laid out as padding, beginning, padding, ending; positions count the tokens that are not padding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from qlora.answering.generator import Generator
from qlora.prompt import encode_prompt


def generate_groups(
    generator: Generator, groups: Sequence[Sequence[list[int]]], processors: Sequence[Callable] = ()
) -> list[list[int]]:
    """New token ids for every prompt of all groups, generated as one batch."""
    import torch

    beginnings = [common_beginning(group) for group in groups]
    rows = [number for number, group in enumerate(groups) for _ in group]
    endings = [prompt[len(beginnings[n]) :] for n, group in enumerate(groups) for prompt in group]
    first, last = pad_left(generator.tokenizer, beginnings), pad_left(generator.tokenizer, endings)
    # As `generate` counts them from here on; the model itself would count padding as well.
    first["position_ids"] = (first["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        read = generator.model(**first.to(generator.model.device), use_cache=True, logits_to_keep=1)
    cache = read.past_key_values
    cache.batch_select_indices(torch.tensor(rows, device=generator.model.device))
    for name, part in last.items():
        last[name] = torch.cat([first[name].cpu()[rows], part], dim=1)
    return generator.extend_ids(last, processors, past_key_values=cache)


@dataclass(frozen=True)
class Read:
    """Prompts that were read: a row each, padded on the left."""

    logits: Any  # rows, vocabulary: after the last token
    mask: Any  # rows, tokens: 1 where there is one
    layers: list[tuple]  # keys and values of each layer: rows, heads, tokens, size of a head

    def take(self, rows: Sequence[int]) -> "Read":
        """Some of the rows."""
        rows = list(rows)
        return Read(self.logits[rows], self.mask[rows], [tuple(part[rows] for part in pair) for pair in self.layers])

    def as_cache(self):
        """What `generate` goes on from: the only row, without its padding and its last token, which is read again."""
        from transformers import DynamicCache

        used = self.mask[0].bool()
        return DynamicCache([tuple(part[:, :, used][:, :, :-1] for part in pair) for pair in self.layers])


class Beginning:
    """The tokens that prompts begin with, computed once; prompts that begin otherwise are read whole."""

    def __init__(self, generator: Generator, tokens: Sequence[int] = ()):
        self.generator, self.tokens = generator, list(tokens)
        self.layers: list[tuple] = []
        if self.tokens:
            self.layers = self.read([self.tokens]).layers

    def read(self, prompts: Sequence[list[int]]) -> Read:
        import torch
        from transformers import DynamicCache

        known = len(self.tokens) if self.layers and all(p[: len(self.tokens)] == self.tokens for p in prompts) else 0
        given = pad_left(self.generator.tokenizer, [prompt[known:] for prompt in prompts])
        given = given.to(self.generator.model.device)
        mask = torch.nn.functional.pad(given["attention_mask"], [known, 0], value=1)
        shared = [tuple(part.expand(len(prompts), -1, -1, -1) for part in pair) for pair in self.layers]
        cache = DynamicCache(shared) if known else DynamicCache()  # never one of a sliding window: its rows can't join
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        logits = read_tokens(self.generator.model, given["input_ids"], mask, positions, cache)
        return Read(logits, mask, layers_of(cache))


def read_tokens(model, ids, mask, positions, cache):
    """The logits after the last token of each row; the cache grows by all of them."""
    import torch

    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    with torch.inference_mode():
        return model(ids, **given, use_cache=True, logits_to_keep=1).logits[:, -1]


def layers_of(cache) -> list[tuple]:
    """(keys, values) of every layer: rows, heads, tokens, size of a head."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def rules_of_all(tokenizer, prompt) -> list[int]:
    """The tokens that every prompt with passages begins with, as long as no earlier turn stands before them."""
    texts = [prompt.messages(question, [question]) for question in "?!"]
    return common_beginning([encode_prompt(tokenizer, messages) for messages in texts])


def pad_left(tokenizer, rows: Sequence[list[int]]):
    """The rows as tensors `input_ids` and `attention_mask`."""
    return tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt")


def common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, without the last token of any of them."""
    shortest = min(map(len, prompts)) - 1
    equal = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return prompts[0][: min(shortest, sum(1 for _ in equal))]
