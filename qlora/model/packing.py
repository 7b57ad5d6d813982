"""Prefix sharing: rows of a batch in one sequence without padding, their common beginnings computed once.

All rows of a run begin with the same system message, and many continue with the same passages. What comes later
in a row changes nothing before it. So one copy of a beginning serves every row that has it, forward and
backward, to the same loss (docs/packing.md). `register_attention` gives transformers the attention for it.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, groupby

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qlora import machine

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
    useful: int  # tokens of all rows, shared ones once per row
    seen: torch.Tensor | None  # (keys,): where the keys of each piece stand; None where nothing is shared
    bounds: torch.Tensor  # (2, pieces + 1), int32: where the queries and the keys of each piece begin

    def to(self, device, non_blocking: bool = False) -> "PackedBatch":
        """The batch on a device; accelerate calls this method."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a piece. The latter is the length of the longest row."""
        lengths = [length for length, _ in self.pieces]
        return max(lengths), max(length + sum(lengths[n] for n in before) for length, before in self.pieces)


def pack(input_ids: torch.Tensor, mask: torch.Tensor) -> PackedBatch:
    """The packed batch of a batch padded on the left: (rows, longest) of ids, and a mask that is 1 where a row is.

    Give tensors on the CPU: with tensors on a GPU the CPU would wait for each row.
    """
    rows = [ids[kept] for ids, kept in zip(input_ids, mask.bool(), strict=True)]
    start = count_common(rows)
    tokens, positions, pieces = [rows[0][:start]], [torch.arange(start)], [(start, ())]
    spans, index = [torch.arange(start)], torch.zeros_like(mask)

    def add(row: torch.Tensor, first: int, last: int, before: tuple[int, ...]) -> tuple[int, ...]:
        tokens.append(row[first:last])
        positions.append(torch.arange(first, last))
        pieces.append((last - first, before))
        at = sum(map(len, spans))
        spans.append(torch.arange(at, at + last - first))
        return (*before, len(pieces) - 1)

    done = 0
    for _, group in groupby(rows, key=lambda row: row[start : start + AHEAD].tolist()):
        group = list(group)
        shared = start + count_common([row[start:] for row in group])
        before = add(group[0], start, shared, (0,)) if shared > start else (0,)
        for row in group:
            path = add(row, shared, len(row), before)
            index[done, -len(row) :] = torch.cat([spans[piece] for piece in path])
            done += 1
    seen, bounds = list_keys(pieces, spans)
    ids, places = torch.cat(tokens)[None], torch.cat(positions)[None]
    return PackedBatch(ids, places, pieces, index, sum(map(len, rows)), seen, bounds)


def list_keys(pieces: list[tuple], spans: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`seen` and `bounds` of a packed batch whose pieces stand at `spans`; empty pieces are left out."""
    kept = [n for n, span in enumerate(spans) if len(span)]
    keys = [torch.cat([spans[seen] for seen in (*pieces[n][1], n)]) for n in kept]
    bounds = [list(accumulate(map(len, parts), initial=0)) for parts in ([spans[n] for n in kept], keys)]
    is_shared = bounds[1][-1] > bounds[0][-1]
    return torch.cat(keys) if is_shared else None, torch.tensor(bounds, dtype=torch.int32)


def count_common(rows: list[torch.Tensor]) -> int:
    """Tokens with which all rows begin; at least one of each row is left, and a single row shares none."""
    if len(rows) == 1:
        return 0
    shortest = min(map(len, rows)) - 1
    same = torch.stack([row[:shortest] == rows[0][:shortest] for row in rows]).all(dim=0)
    return int(same.cumprod(dim=0).sum())


def attend(
    module, query, key, value, attention_mask, scaling, packed=None, sliding_window=None, softcap=None, **kwargs
):
    """transformers' attention function: (1, heads, tokens, size) of a packed batch -> (1, tokens, heads, size).

    Without `packed` the batch is an ordinary one, and sdpa's unless scores have a soft cap (Gemma 2). A query sees the
    last `sliding_window` keys of its row.
    """
    if packed is None and softcap:
        return attend_capped(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    if packed is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("dropout"):
        raise NotImplementedError("packed attention has no dropout")
    window = sliding_window if (sliding_window or packed.longest[1]) < packed.longest[1] else None
    if is_flash(query) and not softcap:
        return attend_at_once(query, key, value, packed, scaling, window)[None], None
    on_gpu = query.device.type != "cpu"
    attend_piece = attend_fused if on_gpu else attend_plain
    if window or softcap:
        attend_piece = partial(attend_plain, window=window, softcap=softcap)
    given = query, key, value, packed.pieces, scaling, attend_piece
    # checkpoint keeps its arguments even without gradients
    if on_gpu or query.shape[2] <= SHORT or not torch.is_grad_enabled():
        return attend_pieces(*given).transpose(1, 2), None
    return checkpoint(attend_pieces, *given, use_reentrant=False).transpose(1, 2), None


def is_flash(query: torch.Tensor) -> bool:
    """Whether FlashAttention takes these queries."""
    return query.device.type != "cpu" and machine.has_flash_attention(query.dtype) and query.shape[-1] % 8 == 0


def attend_at_once(query, key, value, packed: PackedBatch, scaling: float, window: int | None) -> torch.Tensor:
    """The attention of all pieces in one call of FlashAttention (arXiv 2307.08691): (tokens, heads, size).

    Its causal mask is aligned to the last query and the last key, as is `attend_fused`'s.
    """
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packed.seen is not None:
        key, value = (tensor.index_select(0, packed.seen) for tensor in (key, value))
    options = {} if query.shape[1] == key.shape[1] else {"enable_gqa": True}  # torch 2.11 does not know the name
    options["window_size"] = (
        window - 1 if window else -1,
        0,
    )  # keys before a query that it sees, -1 for all, and after
    return varlen_attn(query, key, value, *packed.bounds, *packed.longest, scale=scaling, **options)


def attend_pieces(query, key, value, pieces: list[tuple], scaling: float, attend_piece) -> torch.Tensor:
    """The attention of every piece to the pieces before it and to itself, one by one: (1, heads, tokens, size)."""
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


def attend_plain(query, key, value, scaling: float, window: int | None = None, softcap: float | None = None):
    """The same by matrix products: a third faster on the CPU, where the backward pass of the fused kernels is slow.

    Query heads that share a key head are the rows of one product, so that keys are not repeated.
    """
    (_, heads, tokens, size), groups, length = query.shape, key.shape[1], key.shape[2]
    hidden = hide_unseen(tokens, length, heads // groups, window, query.dtype, query.device)
    rows, columns = query.reshape(groups, -1, size), key[0].transpose(1, 2)
    if softcap:
        scores = (torch.bmm(rows, columns) * (scaling / softcap)).tanh() * softcap + hidden
    else:
        scores = torch.baddbmm(hidden, rows, columns, alpha=scaling)
    return (scores.softmax(dim=-1) @ value[0]).view(1, heads, tokens, size)


def attend_capped(query, key, value, mask, scaling: float, softcap: float) -> torch.Tensor:
    """The attention of an ordinary batch with a soft cap; without a mask it is causal."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * (scaling / softcap)).tanh() * softcap
    if mask is None:
        tokens, length = scores.shape[2:]
        mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value


@lru_cache(maxsize=64)  # pieces of a batch, the same in every layer
def hide_unseen(tokens: int, length: int, heads: int, window: int | None, dtype: torch.dtype, device) -> torch.Tensor:
    """(heads * tokens, length): -inf where a key comes after the query, or before its window, else 0."""
    hidden = torch.full((tokens, length), float("-inf"), dtype=dtype, device=device)
    later = hidden.triu(1 + length - tokens)
    return (later + hidden.tril(length - tokens - window) if window else later).repeat(heads, 1)


def register_attention() -> None:
    """Makes the name `packed` known to transformers."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
