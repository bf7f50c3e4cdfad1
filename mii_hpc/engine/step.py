"""What all ranks of a replica do together in one step, as the leader decided it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DRAWN = -1
"""Stands for the token that its slot has drawn last, where the device knows it and the host does not yet."""


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
    blocks: tuple[int, ...]
    sample: bool
    slot: int = 0
    fresh: bool = True
    length: int = 0
    scores: bool = False

    @property
    def num_scores(self) -> int:
        """For how many of its tokens, the first ones, logits are wanted besides those for `sample`."""
        return (len(self.token_ids) - self.sample) * self.scores


@dataclass(frozen=True)
class Step:
    """One forward pass. Slices of a single token come first; `clear` names blocks to zero before.

    Every layer must write the keys and values of slices of several tokens before it reads any: another slice of the
    same step may share a block that these fill. What a slice of a single token writes is read by itself alone.
    """

    slices: tuple[Slice, ...] = ()
    clear: tuple[int, ...] = ()
    stop: bool = False
    """The last step: there is nothing to compute, and the ranks return."""

    num_samples: int = field(init=False, default=0)
    """For how many slices a token is drawn."""

    def __post_init__(self) -> None:
        """Count the samples."""
        object.__setattr__(self, "num_samples", sum(part.sample for part in self.slices))

    @property
    def decodes(self) -> bool:
        """Whether each slice is the last token of its sequence."""
        return self.num_samples == len(self.slices) == sum(len(part.token_ids) for part in self.slices) > 0

    def packed(self) -> tuple[list[int], list[int], list[int]]:
        """Return the token ids of all slices in one row, their positions, and where in it each slice ends."""
        token_ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for part in self.slices:
            token_ids += part.token_ids
            positions += range(part.start, part.start + len(part.token_ids))
            last_rows.append(len(token_ids) - 1)
        return token_ids, positions, last_rows


class StepCodec:
    """Steps as integers, from the leader to the other ranks. Each end has one, which sees all steps in their order.

    A block table goes over whole with a slot's first slice, and then only what is added to it.
    """

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, ...]] = {}

    def encode(self, step: Step) -> list[int]:
        """Return the step as integers."""
        numbers = [int(step.stop), len(step.slices), len(step.clear), *step.clear]
        for part in step.slices:
            known = 0 if part.fresh else len(self._tables[part.slot])
            added = part.blocks[known:]
            self._tables[part.slot] = part.blocks
            flags = part.sample + 2 * part.fresh + 4 * part.scores
            numbers += (part.slot, flags, part.start, part.length, len(part.token_ids), len(added))
            numbers += part.token_ids
            numbers += added
        return numbers

    def decode(self, numbers: Sequence[int]) -> Step:
        """Return the step that `encode` wrote."""
        stop, count, clear = numbers[:3]
        at = 3 + clear
        slices = []
        for _ in range(count):
            slot, flags, start, length, tokens, added = numbers[at : at + 6]
            middle = at + 6 + tokens
            at, first = middle + added, at + 6
            blocks = tuple(numbers[middle:at])
            sample, fresh = bool(flags & 1), bool(flags & 2)
            if not fresh:
                blocks = self._tables[slot] + blocks if added else self._tables[slot]
            self._tables[slot] = blocks
            token_ids = tuple(numbers[first:middle])
            slices.append(Slice(start, token_ids, blocks, sample, slot, fresh, length, scores=bool(flags & 4)))
        return Step(tuple(slices), tuple(numbers[3 : 3 + clear]), bool(stop))
