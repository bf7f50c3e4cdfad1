"""Attention that reads the paged cache where it lies: kernels in Triton, for NVIDIA and AMD.

One launch attends for all packed tokens of a layer, decodes and prefill chunks alike. A program takes a tile of rows,
which are the query heads that share one key head, of one or several tokens of one sequence, and goes through the keys
that they see. Where few sequences decode, several programs share the keys of one tile, and a second launch merges what
they found: measured on an H100, that is faster than to have the last of them do it. All that differs from step to step
is read on the device, so that a CUDA graph of a decode step depends on the number of sequences alone. In a decode step
the first keys and values of each program, which earlier steps have written, are loaded while the kernel before still
runs.

Triton's interpreter runs the same kernels on CPU, for tests (TRITON_INTERPRET=1 before this module is imported).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from mii_hpc.engine.devices import kernel_limits
from mii_hpc.engine.overlap import follow, launch_options
from mii_hpc.engine.upload import upload

if TYPE_CHECKING:
    from mii_hpc.engine.attention.base import LayerAttention
    from mii_hpc.engine.blocks import PagedCache
    from mii_hpc.engine.step import Step

MOST_SPLITS = tl.constexpr(32)
LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity where a difference of two of them must not be NaN.
FLOOR = tl.constexpr(-1.0e30)
# Numbers of sequences are searched so many at a time.
SEARCHED = tl.constexpr(128)

PROGRAMS_PER_PROCESSOR = 4
"""Keys are split until so many programs run for each streaming multiprocessor, even where few keys are left for each:
on an H100, with 1 to 256 sequences of 128 to 16,000 tokens, a coarser split was never faster."""


@dataclass
class Batch:
    """What one step computes: which packed tokens belong to which sequence, and where its keys and values lie.

    Integers may be of 32 or 64 bits. A sequence of length 0 is padding: its row of the output is zero. It is
    uploaded, or written by kernels that are launched plainly, before the first layer: kernels of ours read it before
    those that precede them have ended, and these begin after all that is launched plainly has ended.

    Attributes:
        slots: [tokens], where their keys and values go: block * page size + place in the block.
        lengths: [sequences], tokens in all, the new ones included.
        tables: [sequences, width], block tables. What lies beyond a length is not read.
        query_starts: [sequences + 1], the first packed token of each sequence, and their number; None if every
            sequence has one new token.
        split: whether some sequence has a single new token, for whose keys several programs are worth it.
    """

    slots: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    query_starts: torch.Tensor | None = None
    split: bool = True

    def become(self, other: Batch) -> None:
        """Be that of another step."""
        self.slots, self.lengths, self.tables = other.slots, other.lengths, other.tables
        self.query_starts, self.split = other.query_starts, other.split

    @classmethod
    def of(cls, step: Step, page_size: int, device: torch.device) -> Batch:
        """Upload a step, in one copy."""
        lengths, positions = step.starts + step.counts, step.positions
        width = -(-int(lengths.max()) // page_size)
        padded = array("i")
        for table in step.tables:
            padded.extend(table[:width])
            padded.extend([0] * (width - len(table)))
        tables = np.frombuffer(padded, dtype=np.int32).reshape(-1, width)
        blocks = tables[np.arange(len(tables)).repeat(step.counts), positions // page_size]
        slots = blocks * page_size + positions % page_size
        starts = np.append(0, step.last_rows + 1)
        tokens, sequences = len(slots), len(lengths)
        numbers = np.concatenate([slots, lengths, starts, padded], dtype=np.int32)
        uploaded = upload(numbers, device)
        rest = uploaded[tokens:]
        return cls(
            slots=uploaded[:tokens],
            lengths=rest[:sequences],
            query_starts=None if tokens == sequences else rest[sequences : 2 * sequences + 1],
            tables=rest[2 * sequences + 1 :].view(sequences, width),
            split=bool((step.counts == 1).any()),
        )


class TritonAttention:
    """See AttentionBackend. Attends over one cache, for all its layers."""

    reads_in_place = True

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        nothing = torch.zeros(0, dtype=torch.int32, device=cache.device)
        # One for all layers, and always the same: a compiled layer looks for it where it was.
        self._batch = Batch(nothing, nothing, nothing[None])

    def prepare(self, step: Step) -> None:
        """Lay out the next forward pass. Done once per step, for all layers."""
        self._batch.become(Batch.of(step, self._cache.page_size, self._cache.device))

    def prepare_decode(self, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        """Lay out one token each of several sequences; all that is said of them is on the device already.

        `slots` [sequences] are where their keys and values go, `tables` [sequences, blocks] may be wider than any
        sequence needs at no cost, and `lengths` [sequences] count the new token.
        """
        self._batch.become(Batch(slots, lengths, tables))

    def layer(self, number: int) -> LayerAttention:
        """Return what the layer of that number is to attend through."""
        return _Layer(self._cache.keys[number], self._cache.values[number], self._batch)


class _Layer:
    """Attends over the cache of one layer. Has no number: all layers are alike to torch.compile, and compiled once."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, batch: Batch) -> None:
        self.keys, self.values, self.batch = keys, values, batch

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `paged_attention` over the cache of this layer."""
        batch = self.batch
        output: torch.Tensor = paged_attention(
            query,
            key,
            value,
            self.keys,
            self.values,
            batch.slots,
            batch.lengths,
            batch.tables,
            batch.query_starts,
            batch.split,
            scaling,
            window,
            softcap,
            sinks,
        )
        return output


@torch.library.custom_op("mii_hpc::paged_attention", mutates_args=("keys", "values"))
def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    query_starts: torch.Tensor | None = None,
    split: bool = True,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the new keys and values into the cache, then return the attention [tokens, heads, value size].

    `query` [tokens, heads, key size], `key` and `value` are of the packed tokens, `keys` and `values` are the cache
    of this layer, and the rest is as in `Batch` and `attend`. torch.compile leaves this operator out of its graph.
    """
    output = query.new_empty(*query.shape[:2], values.shape[3])
    batch = Batch(slots, lengths, tables, query_starts, split)
    attend(query, key, value, keys, values, output, batch, scaling, window, softcap, sinks, cos, sin)
    return output


@paged_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], value.shape[2])


def write(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Copy the `key` and `value` [tokens, key heads, size] of new tokens into the cache, each to its slot."""
    tokens, heads, key_size = key.shape
    value_size = value.shape[2]
    _write_kernel[(tokens,)](
        keys,
        values,
        key,
        value,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=heads,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        BLOCK=min(triton.next_power_of_2(heads * max(key_size, value_size)), 4096),
        num_warps=4,
        **launch_options(keys.device),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    batch: Batch,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> None:
    """Write into `output` [tokens, heads, value size] what the queries [tokens, heads, key size] attend to.

    The `key` and `value` [tokens, key heads, size] of the new tokens go into `keys` and `values` [blocks, page size,
    key heads, size] first. Each token sees those before it and itself, or as many of the last ones as the `window`
    says. Scores are scaled by `scaling` (by default key size ** -0.5), then capped to `softcap` *
    tanh(score / softcap); `sinks` [heads] are scores of a key without a value, which every token sees.

    With `cos` and `sin` [tokens, rotary size], an even number, queries and keys are rotated first (see `rotate`).
    """
    tokens, heads, key_size = query.shape
    page_size, key_heads, value_size = values.shape[1:]
    sequences = len(batch.lengths)
    group = heads // key_heads
    decode = batch.query_starts is None
    _check_cache(keys, values)
    rotary = 0
    if cos is None or sin is None:
        cos = sin = query[:, 0]  # not read
    elif decode:
        rotary = cos.shape[1]
        cos, sin = _dense_rows(cos), _dense_rows(sin)
    else:
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    query, key, value = _dense_rows(query), _dense_rows(key), _dense_rows(value)
    if not decode:  # programs read what others would have to write first
        write(key, value, keys, values, batch.slots)
    if plan is None:
        plan = Plan.of(query, values, sequences, key_heads, decode, batch.split)
    partials = lse = output
    if plan.splits > 1:
        partials = output.new_empty(sequences, heads, plan.splits, value_size, dtype=torch.float32)
        lse = output.new_empty(sequences, heads, plan.splits, dtype=torch.float32)
    tiles = sequences if decode else tokens // (plan.rows // group) + sequences
    starts = batch.lengths if batch.query_starts is None else batch.query_starts
    _attention_kernel[(key_heads, tiles, plan.splits)](
        output,
        query,
        key,
        value,
        keys,
        values,
        batch.slots,
        starts,
        batch.lengths,
        batch.tables,
        output if sinks is None else sinks,
        cos,
        sin,
        partials,
        lse,
        sequences,
        batch.tables.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        sin.stride(0),
        plan.splits,
        key_size**-0.5 if scaling is None else scaling,
        window or 0,
        softcap or 0.0,
        KEY_HEADS=key_heads,
        GROUP=group,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        ROTARY=rotary,
        PAGE=page_size,
        DECODE=decode,
        SPLIT=plan.splits > 1,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        ROWS=plan.rows,
        COLUMNS=plan.columns,
        KEY_BLOCK=_block(key_size),
        VALUE_BLOCK=_block(value_size),
        num_warps=plan.warps,
        num_stages=plan.stages,
        **launch_options(output.device),
    )
    if plan.splits > 1:
        _merge_kernel[(heads, sequences)](
            output,
            starts,
            batch.lengths,
            partials,
            lse,
            plan.splits,
            window or 0,
            VALUE_SIZE=value_size,
            DECODE=decode,
            WINDOW=window is not None,
            COLUMNS=plan.columns,
            VALUE_BLOCK=_block(value_size),
            num_warps=4,
            **launch_options(output.device),
        )


def rotate(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return `rows` [tokens, heads, size] with rotary position embeddings, as transformers' Llama has them.

    `cos` and `sin` [tokens, rotary size] turn the first elements; those beyond that size stay as they are.
    """
    size = cos.shape[1]
    turned, rest = rows[..., :size].float(), rows[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None].float() + torch.cat([-second, first], -1) * sin[:, None].float()
    return torch.cat([turned.to(rows.dtype), rest], -1)


class Plan(NamedTuple):
    """How a launch is cut into programs.

    Attributes:
        rows: of a tile: tokens times the query heads that share a key head.
        columns: keys that a program takes at a time.
        warps: of a program.
        stages: of the software pipeline that loads keys and values.
        splits: how many programs may share the keys of one token.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1

    @classmethod
    def of(
        cls, query: torch.Tensor, values: torch.Tensor, sequences: int, key_heads: int, decode: bool, split: bool
    ) -> Plan:
        """Choose one from the shapes alone."""
        heads, key_size = query.shape[1:]
        size = max(_block(key_size), _block(values.shape[3]))
        wide = size > 128
        processors, shared_memory = kernel_limits(query.device)
        if query.dtype == torch.float32:
            # Exact products run on the ordinary units, which want small tiles.
            rows, columns, warps, stages = (16, 32, 8, 2) if decode else (32, 16, 8, 2)
        elif decode:
            rows, columns, warps, stages = 16, 32, 4 if wide else 2, 2
        else:
            rows, columns, warps, stages = 128, 32 if wide else 64, 8, 3
        rows = max(rows, triton.next_power_of_2(heads // key_heads))
        # What lies in shared memory at once: the queries, and the keys and values of each stage.
        while (rows + 2 * stages * columns) * size * query.element_size() > shared_memory and columns * stages > 16:
            stages, columns = (stages - 1, columns) if stages > 1 else (stages, columns // 2)
        splits = 1
        if split:
            splits = -(-PROGRAMS_PER_PROCESSOR * processors // (sequences * key_heads))
            splits = min(splits, MOST_SPLITS.value)
        return cls(rows, columns, warps, stages, splits)


def _block(size: int) -> int:
    """Return the width of the tile that holds a head: tiles are powers of two, and products want 16."""
    block: int = max(16, triton.next_power_of_2(size))
    return block


def _check_cache(keys: torch.Tensor, values: torch.Tensor) -> None:
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("the cache of a layer must be contiguous")


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# What differs from step to step is not specialized: no step compiles a kernel anew for a multiple of 16.


@triton.jit(do_not_specialize=["slots"])
def _write_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    slots: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    follow(EARLY)
    for start in tl.static_range(0, HEADS * KEY_SIZE, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < HEADS * KEY_SIZE
        source = key + token * key_token_stride + index // KEY_SIZE * key_head_stride + index % KEY_SIZE
        tl.store(keys + slot * (HEADS * KEY_SIZE) + index, tl.load(source, mask=inside), mask=inside)
    for start in tl.static_range(0, HEADS * VALUE_SIZE, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < HEADS * VALUE_SIZE
        source = value + token * value_token_stride + index // VALUE_SIZE * value_head_stride + index % VALUE_SIZE
        tl.store(values + slot * (HEADS * VALUE_SIZE) + index, tl.load(source, mask=inside), mask=inside)


@triton.jit(
    do_not_specialize=[
        "slots", "query_starts", "lengths", "tables", "sequences", "table_stride", "splits", "window"
    ]
)  # fmt: skip
def _attention_kernel(
    output: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    query_starts: tl.tensor,
    lengths: tl.tensor,
    tables: tl.tensor,
    sinks: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    partials: tl.tensor,
    lse: tl.tensor,
    sequences: tl.tensor,
    table_stride: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    splits: tl.tensor,
    scaling: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = ROWS // GROUP
    key_head = tl.program_id(0)
    split = tl.program_id(2)

    # Which tokens: `first` is the first of the tile, counted from the sequence's first new one, `packed`.
    if DECODE:
        sequence = tl.program_id(1)
        packed = sequence
        new = 1
        first = 0
    else:
        # The last tiles of a chunk see the most keys, so they start first.
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        sequence = _sequence_of(query_starts, sequences, tile, TOKENS)
        packed = tl.load(query_starts + sequence).to(tl.int32)
        new = tl.load(query_starts + sequence + 1).to(tl.int32) - packed
        first = (tile - packed // TOKENS - sequence) * TOKENS
        if first >= new:
            return
    context = tl.load(lengths + sequence).to(tl.int32) - new

    # Which keys: from `begin`, a multiple of COLUMNS, to `end`.
    begin, end = _span(context, first, new, window, WINDOW, TOKENS, COLUMNS)
    used = 1
    if SPLIT:
        share, used = _share(begin, end, new, splits, COLUMNS)
        if split >= used:
            return  # the first split waits for the kernels before
        begin += split * share
        end = tl.minimum(end, begin + share)

    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = key_head * GROUP + row % GROUP
    real = (row < TOKENS * GROUP) & (token < new)
    position = context + token
    key_size = tl.arange(0, KEY_BLOCK)
    value_size = tl.arange(0, VALUE_BLOCK)
    table = tables + sequence.to(tl.int64) * table_stride
    if DECODE:
        # The new token is attended to where it comes from. Those before it are in the cache since earlier steps.
        last = (split == used - 1) & (context >= 0)
        slot = tl.load(slots + sequence).to(tl.int64) * KEY_HEADS + key_head
        end = tl.minimum(end, context)
        early_k, early_v = _load_block(
            begin, end, keys, values, table, key_head,
            KEY_HEADS, KEY_SIZE, VALUE_SIZE, PAGE, True, COLUMNS, KEY_BLOCK, VALUE_BLOCK,
        )  # fmt: skip
    follow(EARLY)

    query_inside = real[:, None] & (key_size < KEY_SIZE)[None, :]
    turn_cos, turn_sin = 1.0, 0.0
    if ROTARY > 0:
        # For each row, so that its threads need not get it from others.
        turned = real[:, None] & (key_size < ROTARY)[None, :]
        place = (sequence.to(tl.int64) * cos_stride + row * 0)[:, None] + key_size[None, :]
        turn_cos = tl.load(cos + place, mask=turned, other=1.0).to(tl.float32)
        place = (sequence.to(tl.int64) * sin_stride + row * 0)[:, None] + key_size[None, :]
        turn_sin = tl.load(sin + place, mask=turned, other=0.0).to(tl.float32)
        turn_sin = tl.where((key_size < ROTARY // 2)[None, :], -turn_sin, turn_sin)
    if DECODE:
        # Before the query, which the program waits for at once.
        source = sequence.to(tl.int64) * key_token_stride + key_head * key_head_stride + row * 0
        key_inside = query_inside & (key_size < tl.where(last, KEY_SIZE, 0))[None, :]
        new_k = _load_rows(key + source, key_inside, turn_cos, turn_sin, ROTARY, KEY_BLOCK).to(keys.dtype.element_ty)
        source = sequence.to(tl.int64) * value_token_stride + key_head * value_head_stride
        value_inside = value_size < tl.where(last, VALUE_SIZE, 0)
        new_v = tl.load(value + source + value_size, mask=value_inside, other=0.0).to(values.dtype.element_ty)
    source = (packed + token).to(tl.int64) * query_token_stride + head * query_head_stride
    q = _load_rows(query + source, query_inside, turn_cos, turn_sin, ROTARY, KEY_BLOCK).to(query.dtype.element_ty)
    # Scores are in units of log2(e), for exp2 is what the hardware has.
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    if DECODE:
        # Nobody else reads them in this step.
        place = slot * KEY_SIZE + row * 0
        tl.store(keys + place[:, None] + key_size[None, :], new_k, mask=key_inside & (row == 0)[:, None])
        tl.store(values + slot * VALUE_SIZE + value_size, new_v, mask=value_inside)
        score = _scaled(tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1), scaling, softcap, SOFTCAP)
        top = tl.where(last, score, top)
        total = tl.where(last, 1.0, total)
        sums += new_v.to(tl.float32)[None, :]
    if SINKS:
        # A key without a value, which the first split sees.
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        sink = tl.where(split == 0, sink, float("-inf"))
        new_top = tl.maximum(sink, top)
        fade = tl.exp2(top - new_top)
        top, total, sums = new_top, total * fade + tl.exp2(sink - new_top), sums * fade[:, None]
    if DECODE:
        top, total, sums = _attend_block(
            top, total, sums, q, early_k, early_v, position, begin, end, scaling, window, softcap,
            True, WINDOW, SOFTCAP, COLUMNS,
        )  # fmt: skip
        begin += COLUMNS
    seen_by_all = begin
    if not DECODE and not WINDOW:
        # No mask for keys that every row sees.
        seen_by_all = tl.maximum(begin, tl.minimum(end, (context + first + 1) // COLUMNS * COLUMNS))
        for start in range(begin, seen_by_all, COLUMNS):
            k, v = _load_block(
                start, end, keys, values, table, key_head,
                KEY_HEADS, KEY_SIZE, VALUE_SIZE, PAGE, False, COLUMNS, KEY_BLOCK, VALUE_BLOCK,
            )  # fmt: skip
            top, total, sums = _attend_block(
                top, total, sums, q, k, v, position, start, end, scaling, window, softcap,
                False, WINDOW, SOFTCAP, COLUMNS,
            )  # fmt: skip
    for start in range(seen_by_all, end, COLUMNS):
        k, v = _load_block(
            start, end, keys, values, table, key_head,
            KEY_HEADS, KEY_SIZE, VALUE_SIZE, PAGE, True, COLUMNS, KEY_BLOCK, VALUE_BLOCK,
        )  # fmt: skip
        top, total, sums = _attend_block(
            top, total, sums, q, k, v, position, start, end, scaling, window, softcap,
            True, WINDOW, SOFTCAP, COLUMNS,
        )  # fmt: skip

    safe_total = tl.where(total == 0.0, 1.0, total)
    result = sums / safe_total[:, None]
    shown = real[:, None] & (value_size < VALUE_SIZE)[None, :]
    out = ((packed + token).to(tl.int64) * (KEY_HEADS * GROUP) + head) * VALUE_SIZE
    if not SPLIT or used == 1:
        tl.store(output + out[:, None] + value_size[None, :], result, mask=shown)
    else:
        part = (sequence * (KEY_HEADS * GROUP) + head) * splits
        place = (part + split).to(tl.int64) * VALUE_SIZE
        tl.store(partials + place[:, None] + value_size[None, :], result, mask=shown)
        tl.store(lse + part + split, top + tl.log2(safe_total), mask=real)


@triton.jit(do_not_specialize=["query_starts", "lengths", "splits", "window"])
def _merge_kernel(
    output: tl.tensor,
    query_starts: tl.tensor,
    lengths: tl.tensor,
    partials: tl.tensor,
    lse: tl.tensor,
    splits: tl.tensor,
    window: tl.tensor,
    VALUE_SIZE: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    packed = sequence
    new = 1
    if not DECODE:
        packed = tl.load(query_starts + sequence).to(tl.int32)
        new = tl.load(query_starts + sequence + 1).to(tl.int32) - packed
    context = tl.load(lengths + sequence).to(tl.int32) - 1
    # Also where there is nothing to do: the kernel after this one waits for this one alone.
    follow(EARLY)
    if new != 1:
        return
    begin, end = _span(context, 0, 1, window, WINDOW, 1, COLUMNS)
    _, used = _share(begin, end, 1, splits, COLUMNS)
    if used > 1:
        _merge(output, partials, lse, packed, sequence, head, tl.num_programs(0), used, splits,
               VALUE_SIZE, VALUE_BLOCK)  # fmt: skip


@triton.jit
def _sequence_of(query_starts: tl.tensor, sequences: tl.tensor, tile: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """The sequence of a tile. The first tile of each is known without those before: they have no more than this."""
    before = 0
    for base in range(0, sequences, SEARCHED):
        index = base + tl.arange(0, SEARCHED)
        start = tl.load(query_starts + index, mask=index < sequences, other=0).to(tl.int32)
        before += tl.sum(((start // TOKENS + index <= tile) & (index < sequences)).to(tl.int32))
    return before - 1


@triton.jit
def _span(
    context: tl.tensor,
    first: tl.tensor,
    new: tl.tensor,
    window: tl.tensor,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The keys that a tile sees, from a multiple of COLUMNS on."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(context + first - window + 1, 0) // COLUMNS * COLUMNS
    return begin, context + tl.minimum(first + TOKENS, new)


@triton.jit
def _share(
    begin: tl.tensor, end: tl.tensor, new: tl.tensor, splits: tl.tensor, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """How many keys each split takes, and how many splits have any. The keys of a chunk are not split."""
    blocks = tl.cdiv(end - begin, COLUMNS)
    share = tl.maximum(tl.cdiv(blocks, tl.where(new == 1, splits, 1)), 1)
    return share * COLUMNS, tl.maximum(tl.cdiv(blocks, share), 1)


@triton.jit
def _load_rows(
    rows: tl.tensor,
    inside: tl.tensor,
    turn_cos: tl.tensor,
    turn_sin: tl.tensor,
    ROTARY: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
) -> tl.tensor:
    """The rows [ROWS, KEY_BLOCK] from some places on, rotated. The first half of the sines is negative."""
    index = tl.arange(0, KEY_BLOCK)
    x = tl.load(rows[:, None] + index[None, :], mask=inside, other=0.0)
    if ROTARY > 0:
        partner = (index + ROTARY // 2) % ROTARY
        y = tl.load(rows[:, None] + partner[None, :], mask=inside & (index < ROTARY)[None, :], other=0.0)
        x = x.to(tl.float32) * turn_cos + y.to(tl.float32) * turn_sin
    return x


@triton.jit
def _load_block(
    start: tl.tensor,
    end: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    key_head: tl.tensor,
    KEY_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The keys [KEY_BLOCK, COLUMNS] and values [COLUMNS, VALUE_BLOCK] from `start` on."""
    column = tl.arange(0, COLUMNS)
    key_size = tl.arange(0, KEY_BLOCK)
    value_size = tl.arange(0, VALUE_BLOCK)
    place = start + column
    inside = place < end
    # What lies beyond the end is not read: it may be another's, and not even a number.
    if PAGE % COLUMNS == 0:
        page = table + start // PAGE
        block = tl.load(page, mask=start < end, other=0) if MASKED else tl.load(page)
        slot = block.to(tl.int64) * PAGE + start % PAGE + column
    elif MASKED:
        slot = tl.load(table + place // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + place % PAGE
    else:
        slot = tl.load(table + place // PAGE).to(tl.int64) * PAGE + place % PAGE
    here = slot * KEY_HEADS + key_head
    k_places = keys + here[None, :] * KEY_SIZE + key_size[:, None]
    v_places = values + here[:, None] * VALUE_SIZE + value_size[None, :]
    if MASKED:
        k = tl.load(k_places, mask=inside[None, :] & (key_size < KEY_SIZE)[:, None], other=0.0)
        v = tl.load(v_places, mask=inside[:, None] & (value_size < VALUE_SIZE)[None, :], other=0.0)
    else:
        if KEY_SIZE != KEY_BLOCK:
            k = tl.load(k_places, mask=(key_size < KEY_SIZE)[:, None], other=0.0)
        else:
            k = tl.load(k_places)
        if VALUE_SIZE != VALUE_BLOCK:
            v = tl.load(v_places, mask=(value_size < VALUE_SIZE)[None, :], other=0.0)
        else:
            v = tl.load(v_places)
    return k, v


@triton.jit
def _attend_block(
    top: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    position: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    scaling: tl.tensor,
    window: tl.tensor,
    softcap: tl.tensor,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Go on with COLUMNS keys: the largest score so far, the sum of exponentials, and of weighted values."""
    scores = _scaled(tl.dot(q, k.to(q.dtype), input_precision="ieee"), scaling, softcap, SOFTCAP)
    if MASKED:
        place = start + tl.arange(0, COLUMNS)
        visible = (place < end)[None, :] & (place[None, :] <= position[:, None])
        if WINDOW:
            visible &= place[None, :] > position[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
    return new_top, total * fade + tl.sum(weights, 1), sums


@triton.jit
def _scaled(scores: tl.tensor, scaling: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """Scores from products of queries and keys."""
    if SOFTCAP:
        # The hyperbolic tangent, of which Triton has none.
        return (2.0 * tl.sigmoid(scores * (2.0 * scaling / softcap)) - 1.0) * (softcap * LOG2_E)
    return scores * (scaling * LOG2_E)


@triton.jit
def _merge(
    output: tl.tensor,
    partials: tl.tensor,
    lse: tl.tensor,
    packed: tl.tensor,
    sequence: tl.tensor,
    head: tl.tensor,
    heads: tl.tensor,
    used: tl.tensor,
    splits: tl.tensor,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
) -> None:
    """Write the output of one head: what its splits found, weighted by the exponentials that each has summed."""
    split = tl.arange(0, MOST_SPLITS)
    value_size = tl.arange(0, VALUE_BLOCK)
    part = (sequence * heads + head) * splits + split
    weight = tl.load(lse + part, mask=split < used, other=float("-inf"))
    weight = tl.exp2(weight - tl.max(weight, 0))
    weight = weight / tl.sum(weight, 0)
    found = tl.load(
        partials + part.to(tl.int64)[:, None] * VALUE_SIZE + value_size[None, :],
        mask=(split < used)[:, None] & (value_size < VALUE_SIZE)[None, :],
        other=0.0,
    )
    result = tl.sum(found * weight[:, None], 0)
    out = (packed.to(tl.int64) * heads + head) * VALUE_SIZE + value_size
    tl.store(output + out, result, mask=value_size < VALUE_SIZE)
