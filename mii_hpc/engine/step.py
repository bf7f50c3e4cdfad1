"""What all ranks of a replica do together in one step, as the leader decided it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

DRAWN = -1
"""Stands for the token that its slot has drawn last, where the device knows it and the host does not yet."""

BlockTable = tuple[int, ...]
"""The blocks of a sequence. While it gets no more, its steps have the same object."""
_HEADER = 4
_SAMPLE, _FRESH, _SCORES = 1, 2, 4


class Slice(NamedTuple):
    """The next tokens of one sequence.

    Attributes:
        start: how many tokens of it are in the cache already.
        token_ids: the ones to compute. A single one may be DRAWN.
        blocks: its block table, long enough for all of them. Slices that begin alike may share blocks.
        sample: whether the last of them is the sequence's last, so that another is drawn from its logits.
        slot: the number that the sequence has in the batch, from 0 to max_batch_size - 1, while it runs.
        scores: whether the logits of its other tokens are wanted, too: of all but the one that `sample` is for.
        fresh: whether this is the first slice since it has that slot. `blocks` of the others go on from the one before.
        length: how many tokens the sequence has in all, those that later steps compute included.
    """

    start: int
    token_ids: tuple[int, ...]
    blocks: BlockTable
    sample: bool
    slot: int = 0
    fresh: bool = True
    length: int = 0
    scores: bool = False

    @property
    def num_scores(self) -> int:
        """For how many of its tokens, the first ones, logits are wanted besides those for `sample`."""
        return (len(self.token_ids) - self.sample) * self.scores


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass. Slices of a single token come first; `clear` names blocks to zero before.

    The slices are in columns, for there may be hundreds: arrays [slices] of what Slice says of each, and how many
    tokens each has. `token_ids` [tokens] are those of all slices in one row. The numbers are int32.

    Every layer must write the keys and values of slices of several tokens before it reads any: another slice of the
    same step may share a block that these fill. What a slice of a single token writes is read by itself alone.
    """

    starts: np.ndarray
    counts: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    sample: np.ndarray
    fresh: np.ndarray
    scores: np.ndarray
    token_ids: np.ndarray
    tables: Sequence[BlockTable]
    clear: tuple[int, ...] = ()
    stop: bool = False
    """The last step: there is nothing to compute, and the ranks return."""

    @classmethod
    def of(cls, slices: Sequence[Slice] = (), clear: tuple[int, ...] = (), stop: bool = False) -> Self:
        """Return the step of these slices."""
        return cls(
            starts=numbers([part.start for part in slices]),
            counts=numbers([len(part.token_ids) for part in slices]),
            slots=numbers([part.slot for part in slices]),
            lengths=numbers([part.length for part in slices]),
            sample=flags([part.sample for part in slices]),
            fresh=flags([part.fresh for part in slices]),
            scores=flags([part.scores for part in slices]),
            token_ids=numbers([token_id for part in slices for token_id in part.token_ids]),
            tables=[part.blocks for part in slices],
            clear=clear,
            stop=stop,
        )

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The slices, one by one: what takes hundreds of them reads the columns."""
        token_ids, ends = self.token_ids.tolist(), self.counts.cumsum().tolist()
        columns = (self.starts, self.counts, self.sample, self.slots, self.fresh, self.lengths, self.scores)
        return tuple(
            Slice(start, tuple(token_ids[end - count : end]), table, sample, slot, fresh, length, scores)
            for end, table, start, count, sample, slot, fresh, length, scores in zip(
                ends, self.tables, *(each.tolist() for each in columns), strict=True
            )
        )

    @property
    def num_slices(self) -> int:
        """How many slices there are."""
        return len(self.slots)

    @property
    def decodes(self) -> bool:
        """Whether each slice is the last token of its sequence."""
        return 0 < len(self.token_ids) == self.num_slices and bool(self.sample.all())

    @property
    def positions(self) -> np.ndarray:
        """The position of each token in its sequence."""
        firsts = self.starts - (self.last_rows + 1 - self.counts)
        positions: np.ndarray = np.arange(len(self.token_ids), dtype=np.int32) + firsts.repeat(self.counts)
        return positions

    @property
    def last_rows(self) -> np.ndarray:
        """Where among all tokens the last of each slice is."""
        rows: np.ndarray = self.counts.cumsum(dtype=np.int32) - 1
        return rows

    @property
    def scored_rows(self) -> np.ndarray:
        """Where among all tokens those are for whose logits the slices' `scores` ask."""
        is_scored = self.scores.repeat(self.counts)
        is_scored[self.last_rows[self.sample]] = False
        return np.flatnonzero(is_scored)


def numbers(values: Sequence[int]) -> np.ndarray:
    """Return a column of a step."""
    return np.array(values, dtype=np.int32)


def flags(values: Sequence[bool]) -> np.ndarray:
    """Return a column of a step that says whether something is so."""
    return np.frombuffer(bytes(values), dtype=np.bool_)


class LatestTables:
    """The block tables that the slots had in their latest steps. It is told of all steps, in their order."""

    def __init__(self) -> None:
        self._tables: dict[int, BlockTable] = {}

    def changed(self, step: Step) -> list[tuple[int, int]]:
        """Return the rows of a step whose tables are not their slots' latest, and how many blocks these have kept."""
        latest, rows = self._tables, []
        for row, (slot, table) in enumerate(zip(step.slots.tolist(), step.tables, strict=True)):
            before = latest.get(slot, ())
            if before is not table:  # most have the same one for many steps
                rows.append((row, 0 if step.fresh[row] else len(before)))
                latest[slot] = table
        return rows


class StepCodec:
    """Steps as integers, from the leader to the other ranks. Each end has one, which sees all steps in their order.

    A block table goes over whole with a slot's first slice, and then only what is added to it.
    """

    def __init__(self) -> None:
        self._latest = LatestTables()
        self._tables: dict[int, BlockTable] = {}

    def encode(self, step: Step) -> np.ndarray:
        """Return the step as integers, int32."""
        header = (step.stop, step.num_slices, len(step.token_ids), len(step.clear))
        marks = step.sample * _SAMPLE + step.fresh * _FRESH + step.scores * _SCORES
        added: list[int] = []
        for row, kept in self._latest.changed(step):
            blocks = step.tables[row][kept:]
            added += (row, len(blocks), *blocks)
        columns = (step.slots, step.starts, step.counts, step.lengths, marks)
        parts = (header, step.clear, *columns, step.token_ids, added)
        return np.concatenate(parts, dtype=np.int32, casting="unsafe")

    def decode(self, numbers: np.ndarray) -> Step:
        """Return the step that `encode` wrote."""
        stop, rows, tokens, clear = numbers[:_HEADER].tolist()
        cleared, columns, token_ids, rest = np.split(numbers[_HEADER:], np.cumsum((clear, 5 * rows, tokens)))
        slots, starts, counts, lengths, marks = columns.reshape(5, rows)
        sample, fresh, scores = (marks & bit != 0 for bit in (_SAMPLE, _FRESH, _SCORES))
        own, added, at = slots.tolist(), rest.tolist(), 0
        while at < len(added):
            row, count = added[at : at + 2]
            at += 2 + count
            blocks = tuple(added[at - count : at])
            self._tables[own[row]] = blocks if fresh[row] else self._tables[own[row]] + blocks
        tables = [self._tables[slot] for slot in own]
        clear_blocks = tuple(cleared.tolist())
        return Step(starts, counts, slots, lengths, sample, fresh, scores, token_ids, tables, clear_blocks, bool(stop))
