"""The paged KV cache: who owns which block, and the blocks themselves."""

from __future__ import annotations

import math
import mmap
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from mii_hpc.engine.step import BlockTable

if TYPE_CHECKING:
    import torch

    from mii_hpc.engine.attention.visibility import MaskFunction

NULL_BLOCK = 0
"""Belongs to nobody and stays zero: block tables of different lengths are filled up with it."""

KEY_SIZE = 32
"""Bytes of a block's key: so many that two different beginnings never have the same."""


class BlockAllocator:
    """Allocates the blocks of a cache, and lets sequences with a common prefix share its blocks.

    Blocks are allocated as a sequence grows, not reserved for the longest answer it might have. When they run
    out, the scheduler preempts the youngest sequence and computes it again later: nothing is lost, and a request
    for a long answer that ends early keeps no memory from the others.

    A full block can be registered for sharing, for it is not written again. It is known by a key: a digest of all
    tokens up to its end. Once nobody uses it, it counts as free but stays registered until it is evicted: when no
    other block is free, the least recently used first.
    """

    def __init__(self, num_blocks: int, page_size: int) -> None:
        """Manage `num_blocks` blocks of `page_size` tokens; the null block is one of them."""
        if num_blocks < 2:
            raise ValueError(f"a cache has at least 2 blocks, not {num_blocks}")
        self.page_size = page_size
        self.total = num_blocks - 1
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        # Free as well, but registered. The least recently used is the first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        # Two sequences may have computed the same tokens. Both blocks have the key then, but one is shared.
        self._keys: dict[int, bytes] = {}
        self._shared: dict[bytes, int] = {}
        self._invalid: set[int] = set()
        self._dirty: list[int] = []
        # Where every chain of keys begins. Nobody who does not know it can look for prompts with equal keys.
        self._salt = secrets.token_bytes(KEY_SIZE)

    @property
    def free(self) -> int:
        """How many blocks nobody uses."""
        return len(self._free) + len(self._evictable)

    @property
    def capacity(self) -> int:
        """How many tokens the cache holds."""
        return self.total * self.page_size

    def allocate(self, table: BlockTable, tokens: int) -> BlockTable | None:
        """Return a block table extended to hold that many tokens; None, with nothing done, if too few are free."""
        missing = -(-tokens // self.page_size) - len(table)
        if missing <= 0:
            return table
        if missing > self.free:
            return None
        added = []
        for _ in range(missing):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._evictable.popitem(last=False)
                self._unregister(block)
            self._users[block] = 1
            added.append(block)
        return (*table, *added)

    def share(self, tokens: Sequence[int]) -> BlockTable:
        """Return a table of the registered blocks of a prefix of `tokens`."""
        key, table = self._salt, []
        for index in range(len(tokens) // self.page_size):
            key = self._next_key(key, tokens, index)
            block = self._shared.get(key)
            if block is None:
                break
            self._evictable.pop(block, None)
            self._users[block] += 1
            table.append(block)
        return tuple(table)

    def register(self, table: BlockTable, tokens: Sequence[int], start: int, end: int) -> None:
        """Let others share the blocks that a sequence fills with its tokens from `start` to `end`.

        These must be in the cache before anybody reads them. Invalid blocks, and those that follow one, are left out.
        """
        first, last = start // self.page_size, end // self.page_size
        if first == last:
            return
        key = self._keys.get(table[first - 1]) if first else self._salt
        for index in range(first, last):
            if key is None or table[index] in self._invalid:
                return
            key = self._next_key(key, tokens, index)
            self._keys[table[index]] = key
            self._shared.setdefault(key, table[index])

    def release(self, table: BlockTable) -> None:
        """Free the blocks of a table, as far as its sequence has used them."""
        # From the end, because a block is of no use for sharing without those before it.
        for block in reversed(table):
            self._users[block] -= 1
            if self._users[block]:
                continue
            key = self._keys.get(block)
            if key is not None and self._shared.setdefault(key, block) == block:
                self._evictable[block] = None
                continue
            self._unregister(block)
            self._free.append(block)
            if block in self._invalid:
                self._invalid.remove(block)
                self._dirty.append(block)

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Share blocks no more, and have them zeroed before they are allocated again.

        Not while anybody uses them: zeros would let a sequence that shares them go on, and answer wrongly.
        """
        for block in blocks:
            self._unregister(block)
            if self._users[block]:
                self._invalid.add(block)
                continue
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)
            self._dirty.append(block)

    def take_dirty(self) -> tuple[int, ...]:
        """Return the blocks to zero before the next tokens are written, each once."""
        dirty, self._dirty = tuple(dict.fromkeys(self._dirty)), []
        return dirty

    def _unregister(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None and self._shared.get(key) == block:
            del self._shared[key]

    def _next_key(self, key: bytes, tokens: Sequence[int], index: int) -> bytes:
        """Return the key of a sequence's block, given that of the block before."""
        page = array("q", tokens[index * self.page_size : (index + 1) * self.page_size])
        return blake2b(page.tobytes(), key=key, digest_size=KEY_SIZE).digest()


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps of a token on this rank: (heads, head size) of keys and of values.

    `mask` says which tokens each one sees, by their positions, where a window does not say it.
    """

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype
    mask: MaskFunction | None = None

    def token_bytes(self) -> int:
        """Bytes per token."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


class PagedCache:
    """Keys and values of all layers, each a tensor [blocks, page_size, heads, head size]."""

    def __init__(self, layers: Sequence[LayerShape], num_blocks: int, page_size: int, device: torch.device) -> None:
        """Allocate it. On CPU the memory is taken only as blocks are first written."""
        self.layers = tuple(layers)
        self.page_size = page_size
        self.device = device
        # One block more than there are: rows that only fill up a batch write there, and nobody reads it.
        self.scratch_slot = num_blocks * page_size
        num_blocks += 1
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
