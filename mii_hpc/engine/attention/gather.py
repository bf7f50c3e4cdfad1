"""Attention over the paged cache, as transformers' attention interface wants it."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mii_hpc.engine.attention.cpu import DecodeKernel, compile_kernel
from mii_hpc.engine.blocks import NULL_BLOCK, LayerShape, PagedCache
from mii_hpc.engine.step import Slice, Step
from mii_hpc.errors import ConfigError

# Sequences decode together, padded to the longest of their group. A group ends where the padding of its
# shortest would exceed this factor.
PADDING = 2

_names = itertools.count()


class PagedAttention:
    """Stands in for the attention of every layer of one model.

    The tokens of all sequences are packed in one row, [1, heads, tokens, head size]; `prepare` says which of
    them belong to whom before each forward pass.
    """

    def __init__(self) -> None:
        self.name = f"mii_hpc_{next(_names)}"
        self._cache: PagedCache | None = None
        self._layout: _Layout | None = None
        self._kernel: DecodeKernel | None = None
        self._measured: dict[int, LayerShape] = {}
        # cuDNN comes first by default and takes some 50 ms to plan each new shape; here most steps have one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Weakly: transformers keeps what is registered for ever, and this keeps a cache.
        attend = weakref.WeakMethod(self._attend)
        AttentionInterface.register(self.name, lambda *args, **options: attend()(*args, **options))  # type: ignore[misc]

    @contextmanager
    def measure(self) -> Iterator[dict[int, LayerShape]]:
        """Within this context a forward pass of one sequence needs no cache; each layer's shape is noted."""
        self._measured = {}
        yield self._measured

    def use(self, cache: PagedCache) -> None:
        """Read and write this cache from now on."""
        self._cache = cache
        if cache.keys[0].device.type == "cpu" and len({tensor.dtype for tensor in (*cache.keys, *cache.values)}) == 1:
            self._kernel = compile_kernel(cache.keys[0].dtype)

    def prepare(self, step: Step, device: torch.device) -> None:
        """Lay out the next forward pass. Done once per step, for all layers."""
        assert self._cache is not None
        if step.clear:
            self._cache.clear(step.clear)
        # The kernel does not pad, so it takes all sequences at once.
        self._layout = _Layout.of(step, self._cache.page_size, device, math.inf if self._kernel else PADDING)

    def prepare_decode(self, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        """Lay out one token each of several sequences; where they go, and come from, is on the device already.

        `slots` [sequences] are where their keys and values go, `tables` [sequences, blocks] may be padded with the
        null block, and `lengths` [sequences, 1] count the new token.
        """
        self._layout = _Layout(slots, [_Group(slice(0, len(slots)), tables, lengths)], [])

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        layer: int = module.layer_idx  # type: ignore[assignment]
        if self._cache is None:
            return self._measure(layer, query, key, value, attention_mask, scaling, options)
        layout = self._layout
        assert layout is not None
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys.view(-1, *keys.shape[2:]).index_copy_(0, layout.slots, key[0].transpose(0, 1))
        values.view(-1, *values.shape[2:]).index_copy_(0, layout.slots, value[0].transpose(0, 1))
        heads, tokens = query.shape[1:3]
        output = query.new_empty(tokens, heads, value.shape[3])
        for group in layout.groups:
            queries = query[0, :, group.rows]
            if self._kernel and query.dtype == keys.dtype:
                table = (group.tables, group.lengths)
                self._kernel(queries, keys, values, output[group.rows], *table, scaling, sliding_window)
            else:
                output[group.rows] = _decode(queries, keys, values, group, scaling, sliding_window)
        for chunk in layout.chunks:
            queries = query[:, :, chunk.rows]
            output[chunk.rows] = _read(queries, keys, values, chunk, scaling, sliding_window)
        return output[None], None

    def _measure(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        for feature in ("softcap", "s_aux", "position_bias"):
            if options.get(feature) is not None:
                raise ConfigError(f"attention with {feature} is not supported")
        if attention_mask is not None:
            raise ConfigError("attention with a mask of the model's own is not supported")
        self._measured[layer] = LayerShape((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]), key.dtype)
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
        return output.transpose(1, 2), None


@dataclass
class _Group:
    """Sequences that decode one token each: `rows` of the packed tokens, and their padded block tables."""

    rows: slice
    tables: torch.Tensor  # [sequences, blocks]
    lengths: torch.Tensor  # [sequences, 1], the new token included
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, size: int) -> torch.Tensor:
        """Return [sequences, 1, 1, size]; True is attended to."""
        if window not in self.masks:
            places = torch.arange(size, device=self.lengths.device)
            mask = places < self.lengths
            if window is not None:
                mask &= places >= self.lengths - window
            self.masks[window] = mask[:, None, None]
        return self.masks[window]


@dataclass
class _Chunk:
    """Several tokens of one sequence, of which `start` are in the cache before."""

    rows: slice
    table: torch.Tensor
    start: int
    end: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return [new tokens, all tokens]; True is attended to."""
        if window not in self.masks:
            places = torch.arange(self.end, device=self.table.device)
            own = places[self.start :, None]
            mask = places <= own
            if window is not None:
                mask &= places > own - window
            self.masks[window] = mask
        return self.masks[window]


@dataclass
class _Layout:
    """Where the packed tokens go in the cache, and who attends to what."""

    slots: torch.Tensor
    groups: list[_Group]
    chunks: list[_Chunk]

    @classmethod
    def of(cls, step: Step, page_size: int, device: torch.device, padding: float) -> _Layout:
        slots: list[int] = []
        singles: list[Slice] = []
        chunks: list[_Chunk] = []
        for part in step.slices:
            row, end = len(slots), part.start + len(part.token_ids)
            slots += [part.blocks[p // page_size] * page_size + p % page_size for p in range(part.start, end)]
            if len(part.token_ids) == 1:
                singles.append(part)
            else:
                blocks = torch.tensor(part.blocks[: -(-end // page_size)], device=device)
                chunks.append(_Chunk(slice(row, len(slots)), blocks, part.start, end))
        return cls(torch.tensor(slots, device=device), list(_groups(singles, page_size, device, padding)), chunks)


def _groups(singles: list[Slice], page_size: int, device: torch.device, padding: float) -> Iterator[_Group]:
    # The scheduler puts single tokens first and sorts them by length, so a group is a run of rows.
    first = 0
    while first < len(singles):
        shortest = singles[first].start // page_size + 1
        last = first
        while last < len(singles) and singles[last].start // page_size + 1 <= shortest * padding:
            last += 1
        members = singles[first:last]
        width = max(part.start for part in members) // page_size + 1
        tables = [(*part.blocks, *[NULL_BLOCK] * width)[:width] for part in members]
        lengths = [[part.start + 1] for part in members]
        yield _Group(slice(first, last), torch.tensor(tables, device=device), torch.tensor(lengths, device=device))
        first = last


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: _Group,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    sequences, blocks = group.tables.shape
    size = blocks * keys.shape[1]
    tables = group.tables.view(-1)
    key = keys.index_select(0, tables).view(sequences, size, *keys.shape[2:]).transpose(1, 2)
    value = values.index_select(0, tables).view(sequences, size, *values.shape[2:]).transpose(1, 2)
    # The query heads that share a key head attend to the same tokens, just as several queries would.
    grouped = query.transpose(0, 1).reshape(sequences, key.shape[1], -1, query.shape[2])
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=group.mask(window, size), scale=scaling)
    return output.reshape(sequences, -1, output.shape[3])


def _read(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: _Chunk,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    key = keys.index_select(0, chunk.table).flatten(0, 1)[None, : chunk.end].transpose(1, 2)
    value = values.index_select(0, chunk.table).flatten(0, 1)[None, : chunk.end].transpose(1, 2)
    shared = query.shape[1] // key.shape[1]
    if query.is_cuda and shared > 1:
        # Not every fused kernel knows shared key heads, and the one that is always there holds all scores at once.
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    unbounded = window is None or window >= chunk.end
    whole = chunk.start == 0 and unbounded
    mask = None
    if not whole:
        # The first is the same mask, but one that fast kernels know.
        lower_right = query.is_cuda and unbounded
        mask = causal_lower_right(query.shape[2], chunk.end) if lower_right else chunk.mask(window)
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
