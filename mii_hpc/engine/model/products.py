"""Products of few rows with a weight, as decode steps have them: all that counts is how fast the weight is read.

Kernels in Triton, for 16-bit weights on a GPU. Measured on an H100 for the layers of an 8B model: one row reads at 3.0
to 3.1 TB/s and 16 at 2.5 to 2.9, where cuBLAS reads at 2.1 to 2.8 and 2.0 to 2.8; with 64, a layer takes 170 us, not
181. What follows a product is done in its kernel, as a kernel of its own would leave the memory idle for a
microsecond or two: a gate, the sum over the ranks, a residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mii_hpc.engine.devices import kernel_limits
from mii_hpc.engine.model.peers import HALVES, PROGRAMS, ROOM, sum_of_tile
from mii_hpc.engine.overlap import follow, launch_options

MOST_ROWS = 64
"""cuBLAS is as fast for more."""


class Tile(NamedTuple):
    """What a program takes at a time: so many outputs of so many inputs; its software pipeline has stages at most."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 1


ONE_ROW = Tile(outputs=2, inputs=2048, warps=4)
ONE_ROW_OF_MANY = Tile(outputs=4, inputs=2048, warps=8)
MANY = 4096
"""A product of one row has many outputs if they are more than this."""
ONE_ROW_SUMMED = Tile(outputs=4, inputs=1024, warps=4)
FEW_ROWS = Tile(outputs=64, inputs=128, warps=4, stages=6)
MORE_ROWS = Tile(outputs=64, inputs=128, warps=8, stages=4)
MORE_ROWS_OF_FEW = Tile(outputs=32, inputs=128, warps=4, stages=6)
"""Of so few outputs that there would not be a program for each processor."""
WIDE = tl.constexpr(64)
"""From so many rows on, the rows are the first operand of the processors' products, who want 64 there."""
GATE_BLOCK = 1024
"""A program of `gate` takes so many numbers."""


class Sums(NamedTuple):
    """With whose products one is added up: those of peers, see Peers."""

    addresses: torch.Tensor
    counts: torch.Tensor
    rank: int


def is_quick(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `multiply` takes this product, of rows [..., inputs] and a weight [outputs, inputs]."""
    return 0 < rows.numel() <= MOST_ROWS * rows.shape[-1] and rows.dtype == weight.dtype and is_read_quickly(weight)


def is_read_quickly(weight: torch.Tensor) -> bool:
    """Return whether `multiply` takes a weight, if the rows are few."""
    return (
        weight.numel() > 0
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % 16 == 0
        and weight.is_contiguous()
    )


def can_be_summed(weight: torch.Tensor) -> bool:
    """Return whether `multiply` takes sums of products with a weight, if the rows are few."""
    return is_read_quickly(weight) and len(weight) <= PROGRAMS * MORE_ROWS_OF_FEW.outputs


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    gated: bool = False,
    sums: Sums | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows [..., inputs] times a weight [outputs, inputs]: [..., outputs], summed in float32.

    Of outputs that are `gated`, the SiLU of the first half times the second half; with `sums`, the sum over the ranks,
    who are to have as many rows and outputs. Then a `residual`, which is like the product, is added.
    """
    inputs = weight.shape[1]
    flat = rows.reshape(-1, inputs).contiguous()  # a rank's share of wider rows is not
    count = len(flat)
    outputs = len(weight) // 2 if gated else len(weight)
    product = rows.new_empty(*rows.shape[:-1], outputs)
    processors, shared_memory = kernel_limits(rows.device)
    tile = tile_of(count, len(weight), processors, sums is not None)
    grid = (triton.cdiv(len(weight), tile.outputs),)
    arguments = (
        product,
        flat,
        weight,
        product if residual is None else residual.contiguous(),
        product if sums is None else sums.addresses,
        product if sums is None else sums.counts,
        count,
        outputs,
    )
    options = {
        "INPUTS": inputs,
        "OUTPUTS": tile.outputs,
        "BLOCK": tile.inputs,
        "GATED": gated,
        "ADDED": residual is not None,
        "RANK": 0 if sums is None else sums.rank,
        "RANKS": 1 if sums is None else len(sums.addresses),
        "MOST": PROGRAMS,
        "ROOM": ROOM,
        "HALVES": HALVES,
        "THREADS": 32 * tile.warps,
        "num_warps": tile.warps,
        **launch_options(rows.device),
    }
    if count == 1:
        _one_row_kernel[grid](*arguments, **options)
    else:
        rows_of_tile = max(16, triton.next_power_of_2(count))
        stages = stages_of(tile, rows_of_tile, shared_memory)
        _few_rows_kernel[grid](*arguments, ROWS=rows_of_tile, **options, num_stages=stages)
    return product


def tile_of(count: int, outputs: int, processors: int, summed: bool) -> Tile:
    """Return the tile for a product of so many rows and outputs."""
    if count == 1:
        if not summed:
            return ONE_ROW if outputs <= MANY else ONE_ROW_OF_MANY
        tile = ONE_ROW_SUMMED
        while triton.cdiv(outputs, tile.outputs) > PROGRAMS:
            tile = tile._replace(outputs=2 * tile.outputs, inputs=tile.inputs // 2)
        return tile
    if triton.next_power_of_2(count) < WIDE.value:
        return FEW_ROWS
    # The words of a wider tile would not have room.
    return MORE_ROWS_OF_FEW if summed or outputs < processors * MORE_ROWS.outputs else MORE_ROWS


def stages_of(tile: Tile, rows: int, shared_memory: int) -> int:
    """Return how many stages fit: each has its rows and its part of the weight, of 2 bytes, in shared memory."""
    return max(1, min(tile.stages, shared_memory // ((tile.outputs + rows) * tile.inputs * 2)))


def gate(rows: torch.Tensor) -> torch.Tensor:
    """Return the SiLU of the first half of rows [..., outputs], which are contiguous, times the second half."""
    width = rows.shape[-1] // 2
    product = rows.new_empty(*rows.shape[:-1], width)
    if product.numel():
        grid = (triton.cdiv(width, GATE_BLOCK), product.numel() // width)
        _gate_kernel[grid](product, rows, width, BLOCK=GATE_BLOCK, num_warps=4, **launch_options(rows.device))
    return product


@triton.jit
def _gate_kernel(
    product: tl.tensor, rows: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr, EARLY: tl.constexpr
) -> None:
    follow(EARLY)
    row = tl.program_id(1).to(tl.int64) * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(rows + 2 * row + place, mask=place < width, other=0.0).to(tl.float32)
    second = tl.load(rows + 2 * row + width + place, mask=place < width, other=0.0).to(tl.float32)
    tl.store(product + row + place, first * tl.sigmoid(first) * second, mask=place < width)


@triton.jit
def _one_row_kernel(
    product: tl.tensor,
    row: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    addresses: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
    HALVES: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    line, real = _lines(outputs, OUTPUTS, GATED)
    source = weight + line.to(tl.int64)[:, None] * INPUTS
    place = tl.arange(0, BLOCK)
    # The weight does not wait for the kernel before, which makes the row.
    read = tl.load(source + place[None, :], mask=real[:, None] & (place < INPUTS)[None, :], other=0.0)
    follow(EARLY)
    known = tl.load(row + place, mask=place < INPUTS, other=0.0)
    sums = read.to(tl.float32) * known.to(tl.float32)[None, :]
    for start in range(BLOCK, INPUTS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        read = tl.load(source + place[None, :], mask=real[:, None] & (place < INPUTS)[None, :], other=0.0)
        known = tl.load(row + place, mask=place < INPUTS, other=0.0)
        sums += read.to(tl.float32) * known.to(tl.float32)[None, :]
    _finish(tl.sum(sums, 1)[None, :], product, residual, addresses, counts, count, outputs,
            1, OUTPUTS, GATED, ADDED, RANK, RANKS, MOST, ROOM, HALVES, THREADS)  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _few_rows_kernel(
    product: tl.tensor,
    rows: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    addresses: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
    HALVES: tl.constexpr,
    THREADS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    line, real = _lines(outputs, OUTPUTS, GATED)
    row = tl.arange(0, ROWS)
    follow(EARLY)
    if ROWS >= WIDE:
        sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for start in range(0, INPUTS, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < INPUTS
            source = weight + line.to(tl.int64)[None, :] * INPUTS + place[:, None]
            read = tl.load(source, mask=real[None, :] & inside[:, None], other=0.0)
            source = rows + row[:, None] * INPUTS + place[None, :]
            known = tl.load(source, mask=(row < count)[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(known, read, sums)
    else:
        turned = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for start in range(0, INPUTS, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < INPUTS
            source = weight + line.to(tl.int64)[:, None] * INPUTS + place[None, :]
            read = tl.load(source, mask=real[:, None] & inside[None, :], other=0.0)
            source = rows + row[None, :] * INPUTS + place[:, None]
            known = tl.load(source, mask=inside[:, None] & (row < count)[None, :], other=0.0)
            turned = tl.dot(read, known, turned)
        sums = tl.trans(turned)
    _finish(sums, product, residual, addresses, counts, count, outputs,
            ROWS, OUTPUTS, GATED, ADDED, RANK, RANKS, MOST, ROOM, HALVES, THREADS)  # fmt: skip


@triton.jit
def _lines(outputs: tl.tensor, OUTPUTS: tl.constexpr, GATED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Which rows of the weight a program takes, and whether it has them: a gate's and what it gates alternate."""
    line = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    if GATED:
        return line % 2 * outputs + line // 2, line // 2 < outputs
    else:
        return line, line < outputs


@triton.jit
def _finish(
    sums: tl.tensor,
    product: tl.tensor,
    residual: tl.tensor,
    addresses: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    MOST: tl.constexpr,
    ROOM: tl.constexpr,
    HALVES: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Write the product of a program's rows and lines: [ROWS, OUTPUTS]."""
    MADE: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    row = tl.arange(0, ROWS)[:, None]
    output = tl.program_id(0) * MADE + tl.arange(0, MADE)[None, :]
    place = row * outputs + output
    shown = (row < count) & (output < outputs)
    if GATED:
        first, second = tl.split(tl.reshape(sums, [ROWS, MADE, 2]))
        sums = first * tl.sigmoid(first) * second
    if ADDED:
        added = tl.load(residual + place, mask=shown, other=0.0).to(tl.float32)
    if RANKS > 1:
        sums = sum_of_tile(sums, count, addresses, counts, product.dtype.element_ty,
                           RANK, RANKS, MOST, ROOM, HALVES, ROWS, MADE, THREADS)  # fmt: skip
    if ADDED:
        sums += added
    tl.store(product + place, sums, mask=shown)
