"""Decode steps on CUDA as graphs: a step's kernels are launched at once, which else takes longer than they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from mii_hpc.engine.attention.base import AttentionBackend
from mii_hpc.engine.blocks import NULL_BLOCK, PagedCache
from mii_hpc.engine.step import Slice, Step

_log = logging.getLogger(__name__)

# No block table is made narrower than for this many tokens: it would hardly be faster.
MIN_TOKENS = 256
# Beyond these a layer takes about as long to run as to launch: there is nothing to win, and padding begins to cost.
# The keys and values of all sequences, padded to the longest, are copied before a layer attends to them, and those of
# one sequence are gone through one after the other. On an H100 a step at either bound took 0.6 to 0.8 of its time
# without a graph, where a short one takes a quarter. The first also bounds the memory of all graphs together, to some
# 0.6 GiB: EngineConfig.memory_fraction leaves as much and more.
GATHERED_BYTES = 256 * 2**20
MAX_TOKENS = 8192


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""ModelRunner.forward."""


class Shape(NamedTuple):
    """What a graph is captured for: so many sequences, and blocks in the table of each."""

    sequences: int
    blocks: int


class DecodeGraphs:
    """The graphs of one model's decode steps, each captured when the first step of its shape comes.

    A step is filled up to the next larger shape of a few. Once a capture has failed, as with a model that looks at
    its numbers to decide what to compute, there are no more graphs. For one rank alone: nobody has seen NCCL's
    collectives inside of them work here.
    """

    def __init__(
        self, forward: Forward, attention: AttentionBackend, cache: PagedCache, max_batch_size: int, context: int
    ) -> None:
        """Replay steps of up to so many sequences, of up to `context` tokens each, over this cache."""
        self._forward = forward
        self._attention = attention
        self._cache = cache
        self._sequences = sequence_buckets(max_batch_size)
        self._blocks = block_buckets(-(-min(context, MAX_TOKENS) // cache.page_size), cache.page_size)
        self._block_bytes = cache.page_size * max(layer.token_bytes() for layer in cache.layers)
        self._graphs: dict[Shape, _Graph] = {}
        self._usable = True
        # All graphs write here, so that they share the rest of their memory and none keeps any.
        self._logits: torch.Tensor | None = None
        if cache.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]

    @staticmethod
    def work_on(device: torch.device, world_size: int) -> bool:
        """Return whether the steps of a replica of so many ranks can be captured."""
        return device.type == "cuda" and world_size == 1

    @property
    def shapes(self) -> frozenset[Shape]:
        """What has been captured."""
        return frozenset(self._graphs)

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor | None:
        """Return the logits [slices, vocabulary] of a step, good until the next; None if it is none for a graph."""
        shape = self._shape(step)
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None:
            graph = _Graph(shape, self._cache)
            graph.fill(step.slices)
            if not self._capture(graph):
                return None
            self._graphs[shape] = graph
        else:
            graph.fill(step.slices)
        graph.replay()
        assert self._logits is not None
        return self._logits[: len(step.slices)]

    def _shape(self, step: Step) -> Shape | None:
        decodes = all(part.sample and len(part.token_ids) == 1 for part in step.slices)
        if not self._usable or not decodes or not step.slices:
            return None
        longest = max(part.start for part in step.slices) // self._cache.page_size + 1
        if longest > self._blocks[-1]:
            return None
        shape = Shape(bucket(len(step.slices), self._sequences), bucket(longest, self._blocks))
        return shape if shape.sequences * shape.blocks * self._block_bytes <= GATHERED_BYTES else None

    def _capture(self, graph: _Graph) -> bool:
        """Give a graph its `replay`; return False, now and for ever, if that does not work."""
        start = time.perf_counter()
        try:
            graph.replay = self._record(lambda: self._compute(graph))
        except Exception as error:  # noqa: BLE001 (a model can be impossible to capture in many ways)
            reason = str(error.__context__ or error).partition("\n")[0]
            _log.warning("decode steps run without CUDA graphs, several times slower: %s", reason)
            self._usable = False
            self._graphs.clear()
            self._logits = None
            return False
        seconds = time.perf_counter() - start
        _log.info("captured a CUDA graph for %d sequences of %d blocks in %.2f s", *graph.shape, seconds)
        return True

    def _compute(self, graph: _Graph) -> None:
        # Anew each time: the masks that the layers share are made from the lengths, within the graph.
        self._attention.prepare_decode(graph.slots, graph.tables, graph.lengths)
        logits = self._forward(graph.token_ids, graph.positions, graph.every_row)
        if self._logits is None:
            self._logits = logits.new_empty(self._sequences[-1], logits.shape[1])
        self._logits[: len(logits)].copy_(logits)

    def _record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return what does the same on the device again, without Python.

        A step may well be computed several times: it writes the same into the same places of the cache.
        """
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        # Left by this context if the capture fails: torch.cuda.graph would stay on its stream.
        with torch.cuda.stream(self._stream):
            compute()  # what libraries set up at first use cannot be captured
            try:
                # What other threads of this process do with the device meanwhile is no concern of the graph.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    compute()
            except Exception:
                # Else torch's allocator goes on as if within a capture, where it gives no cached memory back.
                with suppress(RuntimeError):  # it has ended that already
                    torch._C._cuda_endAllocateToPool(here.device_index, self._pool)
                raise
        here.wait_stream(self._stream)
        return graph.replay


class _Graph:
    """A graph, and what it reads: at fixed places of the device, to which each step is uploaded as one tensor."""

    replay: Callable[[], None]

    def __init__(self, shape: Shape, cache: PagedCache) -> None:
        self.shape = shape
        self._cache = cache
        sequences, blocks = shape
        self._inputs = torch.zeros(sequences * (4 + blocks), dtype=torch.int64, device=cache.device)
        rows = self._inputs[: 4 * sequences].view(4, sequences)
        self.token_ids, self.positions = rows[0:1], rows[1:2]
        self.slots, self.lengths = rows[2], rows[3]
        self.tables = self._inputs[4 * sequences :].view(sequences, blocks)
        self.every_row = torch.arange(sequences, device=cache.device)

    def fill(self, slices: Sequence[Slice]) -> None:
        """Upload a step. The rows that it does not have attend to a zero, and write where nobody reads."""
        sequences, blocks = self.shape
        page_size, padding = self._cache.page_size, sequences - len(slices)
        positions = [part.start for part in slices]
        slots = [part.blocks[part.start // page_size] * page_size + part.start % page_size for part in slices]
        numbers = [part.token_ids[0] for part in slices] + [0] * padding
        numbers += positions + [0] * padding
        numbers += slots + [self._cache.scratch_slot] * padding
        numbers += [position + 1 for position in positions] + [1] * padding
        for part in slices:
            table = part.blocks[:blocks]
            numbers += table
            numbers += [NULL_BLOCK] * (blocks - len(table))
        numbers += [NULL_BLOCK] * (padding * blocks)
        self._inputs.copy_(torch.tensor(numbers))


def sequence_buckets(largest: int) -> list[int]:
    """Return the numbers of sequences to capture: powers of two, from 16 on also halfway, and the largest."""
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    halfway = [power * 3 // 2 for power in powers if power >= 16]
    return sorted({size for size in (*powers, *halfway) if size < largest} | {largest})


def block_buckets(largest: int, page_size: int) -> list[int]:
    """Return the widths of block tables to capture, each twice the one before, and the largest."""
    sizes = [-(-MIN_TOKENS // page_size)]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], largest]


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the first of the sorted buckets that holds a size."""
    return next(one for one in buckets if one >= size)
