"""Which tokens of which sequences the next step computes. Imports no torch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mii_hpc.engine.blocks import BlockAllocator
from mii_hpc.engine.memory import Budget
from mii_hpc.engine.step import Slice, Step

_log = logging.getLogger(__name__)


class Scheduled(Protocol):
    """What the scheduler knows of a sequence.

    `tokens` are prompt and answer; the first `computed` of them are in the cache, in the blocks of `table`.
    """

    tokens: list[int]
    table: list[int]
    computed: int


S = TypeVar("S", bound=Scheduled)


class Scheduler(Generic[S]):
    """Decides which tokens the next step computes, and owns the blocks of the cache.

    Sequences that decode go first, one token each; what is left of the step's tokens goes to prompts, prefilled in
    chunks in the order of arrival. So a long prompt delays the others by a bounded time.

    With `prefix_sharing`, a sequence starts behind those full blocks of its prefix that are in the cache
    already, or will be in the same step: a step writes all its tokens before it reads any.
    """

    def __init__(self, budget: Budget, prefix_sharing: bool = True, recompute_beyond: int | None = None) -> None:
        """Schedule for these sizes. A sequence that grows beyond `recompute_beyond` tokens is computed anew, once."""
        self.allocator = BlockAllocator(budget.num_blocks + 1, budget.page_size)
        self._budget = budget
        self._prefix_sharing = prefix_sharing
        self._recompute_beyond = recompute_beyond
        # Those that have been computed while they were no longer than that.
        self._short: set[S] = set()
        self._running: list[S] = []
        self._waiting: deque[S] = deque()

    def add(self, sequence: S) -> None:
        """Let a sequence wait for its start."""
        self._waiting.append(sequence)

    def has_work(self) -> bool:
        """Return whether any sequence waits or runs."""
        return bool(self._running or self._waiting)

    def remove(self, sequences: Sequence[S]) -> None:
        """Forget sequences, whatever their state, and free their blocks."""
        for sequence in sequences:
            if sequence in self._running:
                self._running.remove(sequence)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
            self._release(sequence)

    def invalidate(self, sequence: S) -> None:
        """Let nobody else share what a sequence has computed, for it is not finite, and have it zeroed afterwards."""
        self.allocator.invalidate(sequence.table)

    def schedule(self) -> tuple[Step, list[S]]:
        """Return the next step and the sequences of its slices."""
        room = self._budget.max_batch_tokens
        waiting = len(self._waiting)
        counts: dict[S, int] = {}
        for sequence in [one for one in self._running if one in self._short and not self._is_short(one)]:
            self._release(sequence)
        for sequence in sorted(self._running, key=_prefills):
            count = min(len(sequence.tokens) - sequence.computed, room)
            # Those before it may have preempted it.
            runs = len(self._waiting) == waiting or sequence in self._running
            if count and runs and self._allocate(sequence, count, counts):
                counts[sequence] = count
                room -= count
        # Only now is it certain who keeps the blocks that this step fills.
        for sequence, count in counts.items():
            self._register(sequence, count)
        if len(self._waiting) == waiting:  # nobody was preempted, so there may be blocks for others
            self._admit(room, counts)
        self._short.update(sequence for sequence in counts if self._is_short(sequence))
        chosen = sorted(counts, key=lambda sequence: (counts[sequence] > 1, sequence.computed))
        slices = tuple(_slice(sequence, counts[sequence]) for sequence in chosen)
        return Step(slices, self.allocator.take_dirty()), chosen

    def _admit(self, room: int, counts: dict[S, int]) -> None:
        while room and self._waiting and len(self._running) < self._budget.max_batch_size:
            sequence = self._waiting[0]
            # The last token is computed in any case: the next one is drawn from its logits.
            sequence.computed = self.allocator.share(sequence.table, sequence.tokens[:-1])
            count = min(len(sequence.tokens) - sequence.computed, room)
            if not self.allocator.allocate(sequence.table, sequence.computed + count):
                self._release(sequence)
                break
            self._running.append(self._waiting.popleft())
            counts[sequence] = count
            room -= count
            self._register(sequence, count)

    def _allocate(self, sequence: S, count: int, counts: dict[S, int]) -> bool:
        """Get blocks for a sequence, preempting the youngest if need be; return False if it is the youngest."""
        while not self.allocator.allocate(sequence.table, sequence.computed + count):
            youngest = self._running.pop()
            _log.debug("preempted a sequence of %d tokens: the KV cache is full", len(youngest.tokens))
            counts.pop(youngest, None)
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _register(self, sequence: S, count: int) -> None:
        if self._prefix_sharing:
            end = sequence.computed + count
            self.allocator.register(sequence.table, sequence.tokens, sequence.computed, end)

    def _release(self, sequence: S) -> None:
        self.allocator.release(sequence.table)
        sequence.computed = 0
        self._short.discard(sequence)

    def _is_short(self, sequence: S) -> bool:
        return self._recompute_beyond is not None and len(sequence.tokens) <= self._recompute_beyond


def _prefills(sequence: Scheduled) -> bool:
    return len(sequence.tokens) - sequence.computed > 1


def _slice(sequence: Scheduled, count: int) -> Slice:
    end = sequence.computed + count
    return Slice(
        start=sequence.computed,
        token_ids=tuple(sequence.tokens[sequence.computed : end]),
        blocks=tuple(sequence.table),
        sample=end == len(sequence.tokens),
        length=len(sequence.tokens),
    )
