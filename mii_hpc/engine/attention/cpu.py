"""Attention on CPU: decodes through a kernel that is compiled for the processor at hand, if there is a compiler."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, Self

import torch

from mii_hpc.engine.attention.gather import DecodeGroup, GatherAttention
from mii_hpc.engine.attention.visibility import Visibility
from mii_hpc.engine.blocks import PagedCache
from mii_hpc.engine.extensions import compiled

SOURCE = Path(__file__).with_name("cpu.cpp")
FUNCTIONS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}


class CpuAttention(GatherAttention):
    """Decodes through the kernel, and gathers what else there is."""

    padding = math.inf
    """The kernel does not pad, so it takes all sequences at once."""

    def __init__(self, cache: PagedCache, kernel: DecodeKernel) -> None:
        super().__init__(cache)
        self._kernel = kernel

    @classmethod
    def create(cls, cache: PagedCache) -> Self | None:
        """Return this back end over a cache, or None if there is no kernel for it."""
        tensors = (*cache.keys, *cache.values)
        dtypes = {tensor.dtype for tensor in tensors}
        if cache.device.type != "cpu" or len(dtypes) != 1:
            return None
        kernel = compile_kernel(dtypes.pop())
        return None if kernel is None else cls(cache, kernel)

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
        if query.dtype != keys.dtype or softcap is not None or sinks is not None:
            return super()._decode(query, keys, values, group, scaling, visible, softcap, sinks)
        output = query.new_empty(*query.shape[:2], values.shape[3])
        self._kernel(query, keys, values, output, group.tables, group.lengths, scaling, visible.window)
        return output


class _Shape(ctypes.Structure):
    """The struct Shape of cpu.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "sequences",
            "heads",
            "key_heads",
            "key_size",
            "value_size",
            "page_size",
            "table_width",
            "query_head_stride",
            "query_row_stride",
            "window",
        )
    )


class DecodeKernel:
    """Attends for one new token per sequence, reading the paged cache in place.

    Measured with 16 sequences of 100 tokens: under half the time of gathering and
    torch's attention, and a third with 500 tokens.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._function: Any = getattr(library, FUNCTIONS[dtype])
        self._function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.POINTER(_Shape), ctypes.c_float]
        self._function.restype = None

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        scaling: float | None,
        window: int | None,
    ) -> None:
        """Write the output [sequences, heads, value size] for queries [sequences, heads, key size].

        `keys` and `values` are [blocks, page size, key heads, size], `tables` are [sequences, blocks], and the
        `lengths` count the new token, which is in the cache already.
        """
        if query.stride(2) != 1:
            query = query.contiguous()
        sequences, heads, size = query.shape
        shape = _Shape(
            sequences,
            heads,
            keys.shape[2],
            size,
            values.shape[3],
            keys.shape[1],
            tables.shape[1],
            query.stride(1),
            query.stride(0),
            window or 0,
        )
        tensors = (query, keys, values, output, tables, lengths)
        self._function(*(t.data_ptr() for t in tensors), shape, size**-0.5 if scaling is None else scaling)


def compile_kernel(dtype: torch.dtype) -> DecodeKernel | None:
    """Return the kernel for this processor; None where none can be compiled."""
    library = compiled(SOURCE) if dtype in FUNCTIONS else None
    return None if library is None else DecodeKernel(library, dtype)
