"""Products of few rows with a weight, as decode steps have them: all that counts is how fast the weight is read.

Kernels in Triton, for 16-bit weights on a GPU. Measured on an H100 for the layers of an 8B model: one row reads at 3.0
to 3.1 TB/s and 16 at 2.5 to 2.9, where cuBLAS reads at 2.1 to 2.8 and 2.0 to 2.8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mii_hpc.engine.devices import kernel_limits
from mii_hpc.engine.overlap import follow, launch_options

MOST_ROWS = 32
"""cuBLAS is as fast for more."""


class Tile(NamedTuple):
    """What a program takes at a time: so many outputs of so many inputs."""

    outputs: int
    inputs: int
    warps: int


ONE_ROW = Tile(outputs=2, inputs=2048, warps=4)
FEW_ROWS = Tile(outputs=64, inputs=128, warps=4)
MOST_STAGES = 6
"""Of the software pipeline that loads what a tile wants next."""


def is_quick(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether `multiply` takes this product, of rows [..., inputs] and a weight [outputs, inputs]."""
    return (
        0 < rows.numel() <= MOST_ROWS * rows.shape[-1]
        and weight.numel() > 0
        and rows.dtype == weight.dtype
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % 16 == 0
        and weight.is_contiguous()
    )


def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows [..., inputs] times a weight [outputs, inputs]: [..., outputs], summed in float32."""
    outputs, inputs = weight.shape
    flat = rows.reshape(-1, inputs).contiguous()  # a rank's share of wider rows is not
    count = len(flat)
    product = rows.new_empty(*rows.shape[:-1], outputs)
    tile = ONE_ROW if count == 1 else FEW_ROWS
    grid = (triton.cdiv(outputs, tile.outputs),)
    shape = {"INPUTS": inputs, "OUTPUTS": tile.outputs, "BLOCK": tile.inputs}
    launch = {"num_warps": tile.warps, **launch_options(rows.device)}
    if count == 1:
        _one_row_kernel[grid](product, flat, weight, outputs, **shape, **launch)
    else:
        rows_of_tile = max(16, triton.next_power_of_2(count))
        stages = stages_of(tile, rows_of_tile, kernel_limits(rows.device).shared_memory)
        _few_rows_kernel[grid](
            product, flat, weight, count, outputs, ROWS=rows_of_tile, **shape, **launch, num_stages=stages
        )
    return product


def stages_of(tile: Tile, rows: int, shared_memory: int) -> int:
    """Return how many stages fit: each has its rows and its part of the weight, of 2 bytes, in shared memory."""
    return max(1, min(MOST_STAGES, shared_memory // ((tile.outputs + rows) * tile.inputs * 2)))


@triton.jit
def _one_row_kernel(
    product: tl.tensor,
    row: tl.tensor,
    weight: tl.tensor,
    outputs: tl.tensor,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    source = weight + output.to(tl.int64)[:, None] * INPUTS
    place = tl.arange(0, BLOCK)
    real = (output < outputs)[:, None]
    # The weight does not wait for the kernel before, which makes the row.
    read = tl.load(source + place[None, :], mask=real & (place < INPUTS)[None, :], other=0.0)
    follow(EARLY)
    known = tl.load(row + place, mask=place < INPUTS, other=0.0)
    sums = read.to(tl.float32) * known.to(tl.float32)[None, :]
    for start in range(BLOCK, INPUTS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        read = tl.load(source + place[None, :], mask=real & (place < INPUTS)[None, :], other=0.0)
        known = tl.load(row + place, mask=place < INPUTS, other=0.0)
        sums += read.to(tl.float32) * known.to(tl.float32)[None, :]
    tl.store(product + output, tl.sum(sums, 1), mask=output < outputs)


@triton.jit(do_not_specialize=["count"])
def _few_rows_kernel(
    product: tl.tensor,
    rows: tl.tensor,
    weight: tl.tensor,
    count: tl.tensor,
    outputs: tl.tensor,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    source = weight + output.to(tl.int64)[:, None] * INPUTS
    follow(EARLY)
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, INPUTS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < INPUTS
        read = tl.load(source + place[None, :], mask=(output < outputs)[:, None] & inside[None, :], other=0.0)
        known = tl.load(
            rows + row[None, :] * INPUTS + place[:, None], mask=inside[:, None] & (row < count)[None, :], other=0.0
        )
        sums = tl.dot(read, known, sums)
    shown = (row < count)[None, :] & (output < outputs)[:, None]
    tl.store(product + row[None, :] * outputs + output[:, None], sums, mask=shown)
