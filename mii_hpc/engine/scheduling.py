"""Which tokens of which sequences the next step computes. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mii_hpc.engine.cache import BlockAllocator
from mii_hpc.engine.memory import Budget
from mii_hpc.engine.step import Slice, Step


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

    Sequences that generate go first, one token each; what is left of the step's tokens goes to prompts, in
    chunks, in the order of arrival. So a long prompt delays the others by a bounded time.
    """

    def __init__(self, budget: Budget) -> None:
        self.allocator = BlockAllocator(budget.num_blocks + 1, budget.page_size)
        self._budget = budget
        self._running: list[S] = []
        self._waiting: deque[S] = deque()
        self._spoilt: list[int] = []

    def add(self, sequence: S) -> None:
        """Let a sequence wait for its start."""
        self._waiting.append(sequence)

    def has_work(self) -> bool:
        """Return whether any sequence waits or runs."""
        return bool(self._running or self._waiting)

    def drop(self, sequences: Sequence[S]) -> None:
        """Forget sequences, whatever their state, and take their blocks back."""
        for sequence in sequences:
            if sequence in self._running:
                self._running.remove(sequence)
            elif sequence in self._waiting:
                self._waiting.remove(sequence)
            self.allocator.release(sequence.table)

    def spoil(self, sequence: S) -> None:
        """Have the blocks of a sequence zeroed in the next step, before anybody else gets them."""
        self._spoilt += sequence.table

    def schedule(self) -> tuple[Step, list[S]]:
        """Return the next step and the sequences of its slices."""
        room = self._budget.max_batch_tokens
        waiting = len(self._waiting)
        counts: dict[S, int] = {}
        for sequence in sorted(self._running, key=_is_reading):
            count = min(len(sequence.tokens) - sequence.computed, room)
            # Sequences may have been taken out of the batch by those before them.
            if count and sequence in self._running and self._make_room(sequence, count, counts):
                counts[sequence] = count
                room -= count
        if len(self._waiting) == waiting:  # nobody had to give up blocks, so there may be some for others
            self._start_waiting(room, counts)
        chosen = sorted(counts, key=lambda sequence: (counts[sequence] > 1, sequence.computed))
        clear, self._spoilt = tuple(self._spoilt), []
        return Step(tuple(_slice(sequence, counts[sequence]) for sequence in chosen), clear), chosen

    def _start_waiting(self, room: int, counts: dict[S, int]) -> None:
        while room and self._waiting and len(self._running) < self._budget.max_batch_size:
            sequence = self._waiting[0]
            count = min(len(sequence.tokens), room)
            if not self.allocator.grow(sequence.table, count):
                break
            self._running.append(self._waiting.popleft())
            counts[sequence] = count
            room -= count

    def _make_room(self, sequence: S, count: int, counts: dict[S, int]) -> bool:
        """Get blocks for a sequence, if need be from the youngest; return False if it is the youngest."""
        while not self.allocator.grow(sequence.table, sequence.computed + count):
            youngest = self._running.pop()
            counts.pop(youngest, None)
            self.allocator.release(youngest.table)
            youngest.computed = 0
            self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True


def _is_reading(sequence: Scheduled) -> bool:
    return len(sequence.tokens) - sequence.computed > 1


def _slice(sequence: Scheduled, count: int) -> Slice:
    end = sequence.computed + count
    return Slice(
        start=sequence.computed,
        token_ids=tuple(sequence.tokens[sequence.computed : end]),
        blocks=tuple(sequence.table),
        sample=end == len(sequence.tokens),
    )
