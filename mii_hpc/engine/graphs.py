"""Decode steps on CUDA as graphs: a step's kernels are launched at once, which else takes longer than they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch

from mii_hpc.engine.attention.base import AttentionBackend
from mii_hpc.engine.blocks import NULL_BLOCK, PagedCache
from mii_hpc.engine.step import LatestTables, Step
from mii_hpc.engine.upload import staged, upload

_log = logging.getLogger(__name__)

ROWS = 5
"""Numbers of each sequence that a step uploads: token, slot, position, place in the cache, length."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""ModelRunner.forward."""


class DecodeGraphs:
    """The graphs of one model's decode steps, one for each of a few numbers of sequences.

    A step is filled up to the next larger of these. Everything else about it is read on the device, so that contexts
    of any length have the same graph. The ranks of a replica capture together, NCCL's collectives inside, and replay
    together. Where a capture fails on one of them, as with a model that looks at its numbers to decide what to
    compute, none has graphs.
    """

    def __init__(
        self,
        forward: Forward,
        attention: AttentionBackend,
        cache: PagedCache,
        drawn: torch.Tensor,
        context: int,
        agree: Callable[[bool], bool] = bool,
        share: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """Prepare to replay steps over this cache; nothing is captured yet.

        Args:
            forward: computes logits from token ids, positions and rows.
            attention: attends over the cache.
            cache: the keys and values.
            drawn: [slots + 1], the token that each slot has drawn last; the last one is of rows that only fill up.
            context: how many tokens a sequence has at most.
            agree: says whether all ranks succeed, given whether this one does; one after the other on all ranks.
            share: makes token ids those of rank 0, in place.
        """
        self._forward = forward
        self._attention = attention
        self._cache = cache
        self._drawn = drawn
        self._agree = agree
        self._share = share
        self._width = -(-context // cache.page_size)
        slots = len(drawn) - 1
        self._buckets = sequence_buckets(slots)
        # By slot, here and on the device: a step uploads what is new in them.
        self._tables = np.full((slots + 1, self._width), NULL_BLOCK, dtype=np.int32)
        self._on_device = torch.full(self._tables.shape, NULL_BLOCK, dtype=torch.int32, device=cache.device)
        self._latest = LatestTables()
        self._graphs: dict[int, _Graph] = {}
        # All graphs write here, so that they share the rest of their memory and none keeps any.
        self._logits: torch.Tensor | None = None
        if cache.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]

    @staticmethod
    def work_on(device: torch.device, attention: AttentionBackend) -> bool:
        """Return whether steps can be captured there, and it pays."""
        return device.type == "cuda" and attention.reads_in_place

    @property
    def sizes(self) -> list[int]:
        """For how many sequences there are graphs, in ascending order."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def capture(self, progress: Callable[[str], None]) -> None:
        """Capture all graphs, or none if that does not work; on all ranks of the replica at once."""
        start = time.perf_counter()
        # The largest first: the others find room in its memory.
        for number, size in enumerate(reversed(self._buckets), start=1):
            reason = self._capture(size)
            if not self._agree(reason is None):
                reason = reason or "another rank of the replica cannot capture them"
                _log.warning("decode steps run without CUDA graphs, several times slower: %s", reason)
                self._graphs.clear()
                self._logits = None
                return
            if number % 4 == 0 or number == len(self._buckets):
                progress(f"captured {number} of {len(self._buckets)} CUDA graphs")
        _log.info("captured %d CUDA graphs in %.1f s", len(self._buckets), time.perf_counter() - start)

    @torch.inference_mode()
    def run(self, step: Step) -> torch.Tensor | None:
        """Return the logits [slices, vocabulary] of a step, good until the next; None if it is none for a graph.

        To be called with every step, of whatever kind, for the block tables are known from them.
        """
        self._take_tables(step)
        if not self._graphs or not step.decodes:
            return None
        graph = self._graphs[bucket(step.num_slices, self._buckets)]
        graph.fill(step, self._tables, self._cache)
        graph.replay()
        assert self._logits is not None
        return self._logits[: step.num_slices]

    def _take_tables(self, step: Step) -> None:
        """Note the block tables that a step has changed."""
        places: list[int] = []
        blocks: list[int] = []
        for row, kept in self._latest.changed(step):
            first = int(step.slots[row]) * self._width
            places += range(first + kept, first + len(step.tables[row]))
            blocks += step.tables[row][kept:]
        if places:
            self._tables.put(places, blocks)
            where, what = upload(np.array([places, blocks]), self._on_device.device)
            self._on_device.view(-1)[where] = what.int()

    def _capture(self, size: int) -> str | None:
        """Capture the graph for so many sequences; return why that does not work."""
        graph = _Graph(size, len(self._drawn) - 1, self._cache)
        graph.fill(Step.of(), self._tables, self._cache)
        try:
            graph.replay = self._record(lambda: self._compute(graph))
        except Exception as error:  # noqa: BLE001 (a model can be impossible to capture in many ways)
            return str(error.__context__ or error).partition("\n")[0]
        self._graphs[size] = graph
        return None

    def _compute(self, graph: _Graph) -> None:
        token_ids = torch.where(graph.token_ids < 0, self._drawn[graph.slots], graph.token_ids.long())
        if self._share is not None:
            self._share(token_ids)
        # Anew each time: the masks that the layers share are made from the lengths, within the graph.
        self._attention.prepare_decode(graph.places, self._on_device.index_select(0, graph.slots), graph.lengths)
        logits = self._forward(token_ids[None], graph.positions.long()[None], graph.every_row)
        if self._logits is None:
            self._logits = logits.new_empty(self._buckets[-1], logits.shape[1])
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

    def __init__(self, size: int, spare_slot: int, cache: PagedCache) -> None:
        """For so many sequences; rows that only fill up have the `spare_slot`, whose block table is empty."""
        self._size, self._spare_slot = size, spare_slot
        self._inputs = torch.zeros(ROWS, size, dtype=torch.int32, device=cache.device)
        self.token_ids, self.slots, self.positions, self.places, self.lengths = self._inputs
        self.every_row = torch.arange(size, device=cache.device)

    def fill(self, step: Step, tables: np.ndarray, cache: PagedCache) -> None:
        """Upload a step. The rows that it does not have attend to a zero, and write where nobody reads."""
        size, used, page_size = self._size, step.num_slices, cache.page_size
        rows = np.empty((ROWS, size), dtype=np.int32)
        rows[:, used:] = [[0], [self._spare_slot], [0], [cache.scratch_slot], [1]]
        rows[0, :used] = step.token_ids
        rows[1, :used] = step.slots
        rows[2, :used] = step.starts
        rows[3, :used] = tables[step.slots, step.starts // page_size] * page_size + step.starts % page_size
        rows[4, :used] = step.starts + 1
        self._inputs.copy_(staged(rows, self._inputs.device), non_blocking=True)


def sequence_buckets(largest: int) -> list[int]:
    """Return the numbers of sequences to capture: powers of two, from 16 on also halfway, and the largest."""
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    halfway = [power * 3 // 2 for power in powers if power >= 16]
    return sorted({size for size in (*powers, *halfway) if size < largest} | {largest})


def bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the first of the sorted buckets that holds a size."""
    return next(one for one in buckets if one >= size)
