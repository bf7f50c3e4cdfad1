"""What all ranks of a replica do together in one step, as the leader decided it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Slice:
    """The next tokens of one sequence.

    Attributes:
        start: how many tokens of it are in the cache already.
        token_ids: the ones to compute.
        blocks: its block table, long enough for all of them. Slices that begin alike may share blocks.
        sample: whether the last of them is the sequence's last, so that another is drawn from its logits.
        length: how many tokens the sequence has in all, those that later steps compute included.
    """

    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    sample: bool
    length: int = 0


@dataclass(frozen=True)
class Step:
    """One forward pass. Slices of a single token come first; `clear` names blocks to zero before.

    Every layer must write the keys and values of all slices before it reads any: a slice may share a block that
    another slice of the same step fills.
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

    def encode(self) -> list[int]:
        """Return the step as integers, for the other ranks."""
        numbers = [int(self.stop), len(self.slices), len(self.clear), *self.clear]
        for part in self.slices:
            numbers += (part.start, len(part.token_ids), len(part.blocks), int(part.sample), part.length)
            numbers += part.token_ids
            numbers += part.blocks
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Step:
        """Return the step that `encode` wrote."""
        source = iter(numbers)
        stop, slices, clear = _take(source, 3)
        cleared = _take(source, clear)
        return cls(tuple(_slice(source) for _ in range(slices)), cleared, bool(stop))


def _take(source: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(source) for _ in range(count))


def _slice(source: Iterator[int]) -> Slice:
    start, tokens, blocks, sample, length = _take(source, 5)
    token_ids = _take(source, tokens)
    return Slice(start, token_ids, _take(source, blocks), bool(sample), length)
