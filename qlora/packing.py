"""Rows of a batch in one sequence without padding, their common beginning computed once.

All rows of a run begin with the same system message, and what comes later in a row changes nothing
before it: one copy of the beginning serves every row, forward and backward, to the same loss.
`register_attention` gives transformers the attention that such a sequence needs.
"""

from dataclasses import dataclass

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "packed"  # also attends ordinary batches, as "sdpa" does: generation uses the same model


@dataclass(frozen=True)
class PackedBatch:
    """The common beginning, then the rest of every row."""

    input_ids: torch.Tensor  # (1, tokens)
    position_ids: torch.Tensor  # (1, tokens)
    lengths: list[int]  # of the beginning, and of each rest
    index: torch.Tensor  # (rows, longest): where a token of the padded batch stands


def pack(input_ids: torch.Tensor, mask: torch.Tensor) -> PackedBatch:
    """A batch padded on the left, (rows, longest) of ids and of 1 where a row is, without what repeats."""
    rows = [ids[kept] for ids, kept in zip(input_ids, mask.bool(), strict=True)]
    start = count_common(rows)
    lengths = [start, *(len(row) - start for row in rows)]
    positions = torch.cat([torch.arange(start), *(torch.arange(start, len(row)) for row in rows)])
    # A token of row n at position p >= start stands where the rests before it end, plus p - start.
    ends = torch.tensor(lengths).cumsum(0)[:-1].to(mask.device)
    own = mask.cumsum(dim=1) - 1
    return PackedBatch(
        input_ids=torch.cat([rows[0][:start], *(row[start:] for row in rows)])[None],
        position_ids=positions[None].to(mask.device),
        lengths=lengths,
        index=torch.where(own < start, own, own - start + ends[:, None]),
    )


def count_common(rows: list[torch.Tensor]) -> int:
    """Tokens with which all rows begin; at least one of each row is left, and a single row shares none."""
    if len(rows) == 1:
        return 0
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(dim=0)
    return int(same.cumprod(dim=0).sum())


def attend(module, query, key, value, attention_mask, scaling, lengths=None, **kwargs):
    """transformers' attention function: (1, heads, tokens, size) of a packed batch -> (1, tokens, heads, size).

    Without `lengths` the batch is an ordinary one, and sdpa's.
    """
    if lengths is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("dropout") or kwargs.get("sliding_window") or kwargs.get("softcap"):
        raise NotImplementedError("packed attention has no dropout, sliding window or soft cap")
    given = query, key, value, lengths, scaling, attend_fused if query.is_cuda else attend_plain
    if query.is_cuda or not torch.is_grad_enabled():  # checkpoint keeps its arguments even without gradients
        return attend_rows(*given).transpose(1, 2), None
    return checkpoint(attend_rows, *given, use_reentrant=False).transpose(1, 2), None


def attend_rows(query, key, value, lengths: list[int], scaling: float, attend_row) -> torch.Tensor:
    """Every rest attends to the common beginning and to itself: (1, heads, tokens, size)."""
    start, *_ = lengths
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    mixed = [attend_row(queries[0], keys[0], values[0], scaling)] if start else []
    for q, k, v in zip(queries[1:], keys[1:], values[1:], strict=True):
        if start:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        mixed.append(attend_row(q, k, v, scaling))
    return torch.cat(mixed, dim=2)


def attend_fused(query, key, value, scaling: float) -> torch.Tensor:
    """Causal attention whose last query sees the last key, by torch's fused kernels."""
    short = query.shape[2] < key.shape[2]
    mask = causal_lower_right(query.shape[2], key.shape[2]) if short else None
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not short, scale=scaling, enable_gqa=True
    )


def attend_plain(query, key, value, scaling: float) -> torch.Tensor:
    """The same by matrix products: on the CPU a third faster than the fused kernels, whose way back is slow.

    Query heads that share a key head are the rows of one product, so that keys are not repeated.
    """
    (_, heads, tokens, size), groups, length = query.shape, key.shape[1], key.shape[2]
    hidden = query.new_full((tokens, length), float("-inf")).triu(1 + length - tokens)
    hidden = hidden.repeat(heads // groups, 1)  # (queries of a group, keys)
    scores = torch.baddbmm(hidden, query.reshape(groups, -1, size), key[0].transpose(1, 2), alpha=scaling)
    return (scores.softmax(dim=-1) @ value[0]).view(1, heads, tokens, size)


def register_attention() -> None:
    """Makes the name `packed` known to transformers."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
