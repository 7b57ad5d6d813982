"""Prompts with a common beginning, such as questions about one passage: the beginning is computed once.

    generate_groups(generator, [[prompt, prompt], [prompt]])       # new tokens of each prompt, in order

Rows are laid out as padding, beginning, padding, ending; positions count the tokens that are not padding.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile

from qlora.answering.generator import Generator


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


def pad_left(tokenizer, rows: Sequence[list[int]]):
    """The rows as tensors `input_ids` and `attention_mask`."""
    return tokenizer.pad({"input_ids": list(rows)}, padding_side="left", return_tensors="pt")


def common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, without the last token of any of them."""
    shortest = min(map(len, prompts)) - 1
    equal = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return prompts[0][: min(shortest, sum(1 for _ in equal))]
