"""The paged KV cache: who owns which block, and the blocks themselves."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NULL_BLOCK = 0
"""Belongs to nobody and stays zero: block tables of different lengths are filled up with it."""


class BlockAllocator:
    """Hands out the blocks of a cache.

    Blocks are given as a sequence grows, not reserved for the longest answer it might have. When they run
    out, the scheduler takes back those of the youngest sequence and computes that one again later: nothing
    is lost, and a request for a long answer that ends early keeps no memory from the others.
    """

    def __init__(self, num_blocks: int, page_size: int) -> None:
        """Manage `num_blocks` blocks of `page_size` tokens; the null block is one of them."""
        if num_blocks < 2:
            raise ValueError(f"a cache has at least 2 blocks, not {num_blocks}")
        self.page_size = page_size
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def free(self) -> int:
        """How many blocks nobody has."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """How many tokens the cache holds."""
        return self.total * self.page_size

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend a block table to hold that many tokens; return False, with nothing done, if it cannot."""
        missing = -(-tokens // self.page_size) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Take all blocks of a table back."""
        self._free.extend(reversed(table))
        table.clear()


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps of a token on this rank: (heads, head size) of keys and of values."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype

    def token_bytes(self) -> int:
        """Bytes per token."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


class PagedCache:
    """Keys and values of all layers, each a tensor [blocks, page_size, heads, head size]."""

    def __init__(self, layers: Sequence[LayerShape], num_blocks: int, page_size: int, device: torch.device) -> None:
        """Allocate it. On CPU the memory is taken only as blocks are first written."""
        self.page_size = page_size
        # Zeros, because padding is read before it is masked, and a stray NaN would survive the mask.
        self.keys = [_zeros((num_blocks, page_size, *layer.key), layer.dtype, device) for layer in layers]
        self.values = [_zeros((num_blocks, page_size, *layer.value), layer.dtype, device) for layer in layers]

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero blocks whose sequence has written numbers that are not finite."""
        chosen = list(blocks)
        for tensor in (*self.keys, *self.values):
            tensor[chosen] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The kernel gives such pages when they are first written; torch.zeros would write them all at once.
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
