"""Attention that copies the keys and values of each sequence together, then attends with torch: works everywhere.

The reference that the other back ends are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mii_hpc.engine.attention.base import LayerAttention
from mii_hpc.engine.attention.visibility import Visibility, see
from mii_hpc.engine.blocks import NULL_BLOCK, PagedCache
from mii_hpc.engine.step import Slice, Step


@dataclass
class DecodeGroup:
    """Sequences that decode one token each: `rows` of the packed tokens, and their padded block tables."""

    rows: slice
    tables: torch.Tensor  # [sequences, blocks]
    lengths: torch.Tensor  # [sequences], the new token included
    masks: dict[Visibility, torch.Tensor] = field(default_factory=dict)

    def mask(self, visible: Visibility, size: int) -> torch.Tensor:
        """Return [sequences, 1, 1, size]; True is attended to."""
        if visible not in self.masks:
            positions = torch.arange(size, device=self.lengths.device)
            lengths = self.lengths[:, None]
            mask = positions < lengths
            if visible.window is not None:
                mask &= positions >= lengths - visible.window
            if visible.mask is not None:
                mask &= see(visible.mask, lengths - 1, positions)
            self.masks[visible] = mask[:, None, None]
        return self.masks[visible]


@dataclass
class Chunk:
    """Several tokens of one sequence: those from `start` to `end`."""

    rows: slice
    table: torch.Tensor
    start: int
    end: int
    masks: dict[Visibility, torch.Tensor] = field(default_factory=dict)

    def mask(self, visible: Visibility) -> torch.Tensor:
        """Return [new tokens, all tokens]; True is attended to."""
        if visible not in self.masks:
            positions = torch.arange(self.end, device=self.table.device)
            own = positions[self.start :, None]
            mask = positions <= own
            if visible.window is not None:
                mask &= positions > own - visible.window
            if visible.mask is not None:
                mask &= see(visible.mask, own, positions)
            self.masks[visible] = mask
        return self.masks[visible]


@dataclass
class _Layout:
    """Where the packed tokens go in the cache, and who attends to what."""

    slots: torch.Tensor
    groups: list[DecodeGroup]
    chunks: list[Chunk]


class GatherAttention:
    """See AttentionBackend."""

    padding: float = 2
    """Sequences decode together, padded to the longest of their group. A group ends where the padding of its shortest
    would exceed this factor."""

    reads_in_place = False

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._layout: _Layout | None = None

    def prepare(self, step: Step) -> None:
        """Lay out the forward pass of a step."""
        page_size, device = self._cache.page_size, self._cache.device
        slots: list[int] = []
        singles: list[Slice] = []
        chunks: list[Chunk] = []
        for part in step.slices:
            row, end = len(slots), part.start + len(part.token_ids)
            slots += [part.blocks[p // page_size] * page_size + p % page_size for p in range(part.start, end)]
            if len(part.token_ids) == 1:
                singles.append(part)
            else:
                table = torch.tensor(part.blocks[: -(-end // page_size)], device=device)
                chunks.append(Chunk(slice(row, len(slots)), table, part.start, end))
        self._layout = _Layout(torch.tensor(slots, device=device), list(self._groups(singles)), chunks)

    def prepare_decode(self, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        """Lay out one token per sequence, on the device."""
        group = DecodeGroup(slice(0, len(slots)), tables.long(), lengths.long())
        self._layout = _Layout(slots.long(), [group], [])

    def layer(self, number: int) -> LayerAttention:
        """Return what the layer of that number is to attend through."""
        return partial(self._attend, number)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write, then attend; return [tokens, heads, value size]."""
        layout = self._layout
        assert layout is not None
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, layout.slots, key)
        values.view(-1, *values.shape[2:]).index_copy_(0, layout.slots, value)
        output = query.new_empty(*query.shape[:2], value.shape[2])
        visible = Visibility(window, self._cache.layers[layer].mask)
        for group in layout.groups:
            queries = query[group.rows]
            output[group.rows] = self._decode(queries, keys, values, group, scaling, visible, softcap, sinks)
        for chunk in layout.chunks:
            queries = query[chunk.rows]
            output[chunk.rows] = self._prefill(queries, keys, values, chunk, scaling, visible, softcap, sinks)
        return output

    def _groups(self, singles: list[Slice]) -> Iterator[DecodeGroup]:
        # The scheduler puts single tokens first and sorts them by length, so a group is a run of rows.
        page_size, device = self._cache.page_size, self._cache.device
        first = 0
        while first < len(singles):
            shortest = singles[first].start // page_size + 1
            last = first
            while last < len(singles) and singles[last].start // page_size + 1 <= shortest * self.padding:
                last += 1
            members = singles[first:last]
            width = max(part.start for part in members) // page_size + 1
            tables = [(*part.blocks, *[NULL_BLOCK] * width)[:width] for part in members]
            lengths = [part.start + 1 for part in members]
            yield DecodeGroup(
                slice(first, last), torch.tensor(tables, device=device), torch.tensor(lengths, device=device)
            )
            first = last

    def _decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        group: DecodeGroup,
        scaling: float | None,
        visible: Visibility,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend for the query [sequences, heads, key size] of a group."""
        sequences, blocks = group.tables.shape
        size = blocks * keys.shape[1]
        tables = group.tables.view(-1)
        key = keys.index_select(0, tables).view(sequences, size, *keys.shape[2:]).transpose(1, 2)
        value = values.index_select(0, tables).view(sequences, size, *values.shape[2:]).transpose(1, 2)
        mask = group.mask(visible, size)
        # The query heads that share a key head attend to the same tokens, just as several queries would.
        grouped = query.reshape(sequences, key.shape[1], -1, query.shape[2])
        if softcap is None and sinks is None:
            with _without_cudnn():
                output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        else:
            shared = None if sinks is None else sinks.view(key.shape[1], -1, 1)
            output = _attention(grouped, key, value, mask, scaling, softcap, shared)
        return output.reshape(sequences, -1, output.shape[3])

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunk: Chunk,
        scaling: float | None,
        visible: Visibility,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend for the query [new tokens, heads, key size] of a chunk."""
        query = query[None].transpose(1, 2)
        key = keys.index_select(0, chunk.table).flatten(0, 1)[None, : chunk.end].transpose(1, 2)
        value = values.index_select(0, chunk.table).flatten(0, 1)[None, : chunk.end].transpose(1, 2)
        shared = query.shape[1] // key.shape[1]
        if softcap is not None or sinks is not None:
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
            own = None if sinks is None else sinks.view(-1, 1, 1)
            output = _attention(query, key, value, chunk.mask(visible), scaling, softcap, own)
            return output[0].transpose(0, 1)
        if query.is_cuda and shared > 1:
            # Not every fused kernel knows shared key heads, and the one that is always there holds all scores at once.
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        unbounded = visible.mask is None and (visible.window is None or visible.window >= chunk.end)
        whole = chunk.start == 0 and unbounded
        mask = None
        if not whole:
            # The first is the same mask, but one that fast kernels know.
            lower_right = query.is_cuda and unbounded
            mask = causal_lower_right(query.shape[2], chunk.end) if lower_right else chunk.mask(visible)
        with _without_cudnn():
            output = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=whole,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        return output[0].transpose(0, 1)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Keep torch from cuDNN's attention, which takes some 50 ms to plan each new shape: here most steps have one."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend as scaled_dot_product_attention does, with what it lacks; `sinks` are as wide as the scores' rows."""
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value
