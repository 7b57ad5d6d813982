"""Prefix sharing: rows of a batch in one sequence without padding, their common beginnings computed once.

All rows of a run begin with the same system message, and many continue with the same passages. What comes later
in a row changes nothing before it. So one copy of a beginning serves every row that has it, forward and
backward, to the same loss (docs/packing.md). `register_attention` gives transformers the attention for it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

ATTENTION = "packed"  # also attends ordinary batches, as "sdpa" does: generation uses the same model
SHORT = 512  # tokens up to which attention is kept for the backward pass: below 10 MB per layer of 9 heads
AHEAD = 32  # tokens after the common beginning by which rows are grouped: equal ones have the same passages


@dataclass(frozen=True)
class PackedBatch:
    """The beginning of all rows; then, per group of neighbours, its beginning and the rest of every row."""

    input_ids: torch.Tensor  # (1, tokens)
    position_ids: torch.Tensor  # (1, tokens)
    pieces: list[tuple[int, tuple[int, ...]]]  # the length of each, and the numbers of the pieces before it in its row
    index: torch.Tensor  # (rows, longest): where a token of the padded batch stands

    def to(self, device, non_blocking: bool = False) -> "PackedBatch":
        """The batch on a device; accelerate calls this method."""
        names = "input_ids", "position_ids", "index"
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


def pack(input_ids: torch.Tensor, mask: torch.Tensor) -> PackedBatch:
    """The packed batch of a batch padded on the left: (rows, longest) of ids, and a mask that is 1 where a row is.

    Give tensors on the CPU: with tensors on a GPU the CPU would wait for each row.
    """
    rows = [ids[kept] for ids, kept in zip(input_ids, mask.bool(), strict=True)]
    start = count_common(rows)
    tokens, positions, pieces = [rows[0][:start]], [torch.arange(start)], [(start, ())]
    index = torch.zeros_like(mask)
    offsets = [0]

    def add(row: torch.Tensor, first: int, last: int, before: tuple[int, ...]) -> tuple[int, ...]:
        offsets.append(offsets[-1] + pieces[-1][0])
        tokens.append(row[first:last])
        positions.append(torch.arange(first, last))
        pieces.append((last - first, before))
        return (*before, len(pieces) - 1)

    done = 0
    for _, group in groupby(rows, key=lambda row: row[start : start + AHEAD].tolist()):
        group = list(group)
        shared = start + count_common([row[start:] for row in group])
        before = add(group[0], start, shared, (0,)) if shared > start else (0,)
        for row in group:
            path = add(row, shared, len(row), before)
            where = [torch.arange(offsets[piece], offsets[piece] + pieces[piece][0]) for piece in path]
            index[done, -len(row) :] = torch.cat(where)
            done += 1
    ids, places = torch.cat(tokens)[None], torch.cat(positions)[None]
    return PackedBatch(input_ids=ids, position_ids=places, pieces=pieces, index=index)


def count_common(rows: list[torch.Tensor]) -> int:
    """Tokens with which all rows begin; at least one of each row is left, and a single row shares none."""
    if len(rows) == 1:
        return 0
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(dim=0)
    return int(same.cumprod(dim=0).sum())


def attend(module, query, key, value, attention_mask, scaling, pieces=None, **kwargs):
    """transformers' attention function: (1, heads, tokens, size) of a packed batch -> (1, tokens, heads, size).

    Without `pieces` the batch is an ordinary one, and sdpa's.
    """
    if pieces is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    longest = max(length + sum(pieces[n][0] for n in before) for length, before in pieces)
    if kwargs.get("dropout") or kwargs.get("softcap") or longest > (kwargs.get("sliding_window") or longest):
        raise NotImplementedError("packed attention has no dropout, soft cap, or window that slides within a row")
    given = query, key, value, pieces, scaling, attend_fused if query.is_cuda else attend_plain
    # checkpoint keeps its arguments even without gradients
    if query.is_cuda or query.shape[2] <= SHORT or not torch.is_grad_enabled():
        return attend_pieces(*given).transpose(1, 2), None
    return checkpoint(attend_pieces, *given, use_reentrant=False).transpose(1, 2), None


def attend_pieces(query, key, value, pieces: list[tuple], scaling: float, attend_piece) -> torch.Tensor:
    """The attention of every piece to the pieces before it and to itself: (1, heads, tokens, size)."""
    lengths = [length for length, _ in pieces]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    mixed = []
    for own, (length, before) in enumerate(pieces):
        if length:
            seen = (torch.cat([tensor[n] for n in (*before, own)], dim=2) for tensor in (keys, values))
            mixed.append(attend_piece(queries[own], *seen, scaling))
    return torch.cat(mixed, dim=2)


def attend_fused(query, key, value, scaling: float) -> torch.Tensor:
    """Causal attention whose last query sees the last key, by torch's fused kernels."""
    short = query.shape[2] < key.shape[2]
    mask = causal_lower_right(query.shape[2], key.shape[2]) if short else None
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not short, scale=scaling, enable_gqa=True
    )


def attend_plain(query, key, value, scaling: float) -> torch.Tensor:
    """The same by matrix products: a third faster on the CPU, where the backward pass of the fused kernels is slow.

    Query heads that share a key head are the rows of one product, so that keys are not repeated.
    """
    (_, heads, tokens, size), groups, length = query.shape, key.shape[1], key.shape[2]
    hidden = hide_later(tokens, length, heads // groups, query.dtype)
    scores = torch.baddbmm(hidden, query.reshape(groups, -1, size), key[0].transpose(1, 2), alpha=scaling)
    return (scores.softmax(dim=-1) @ value[0]).view(1, heads, tokens, size)


@lru_cache(maxsize=64)  # pieces of a batch, the same in every layer
def hide_later(tokens: int, length: int, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """(heads * tokens, length): -inf where a key comes after the query, else 0."""
    return torch.full((tokens, length), float("-inf"), dtype=dtype).triu(1 + length - tokens).repeat(heads, 1)


def register_attention() -> None:
    """Makes the name `packed` known to transformers."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
