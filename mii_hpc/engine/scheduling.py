"""Which tokens of which sequences the next step computes. Imports no torch."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from mii_hpc.engine.blocks import BlockAllocator
from mii_hpc.engine.memory import Budget
from mii_hpc.engine.step import DRAWN, BlockTable, Step, flags, numbers
from mii_hpc.generation import GUEST, OWNER, Caller

_log = logging.getLogger(__name__)

MOST_SCORES = 256
"""Tokens of a step whose logits may be wanted at once: each has as many as the vocabulary, which take memory."""


class Scheduled(Protocol):
    """What the scheduler knows of a sequence.

    Attributes:
        caller: who asks for it; never changes.
        tokens: prompt and answer, as far as they are known.
        unknown: how many more are drawn, or will be by the steps that are scheduled.
        waits: whether it goes on later, when it is known which tokens may come next.
        longest: how many tokens there can be in all: no step is scheduled to draw more.
        computed: how many of them are in the cache, in the blocks of `table`, once the scheduled steps are done.
        registered: of how many of them the blocks are registered for sharing, as far as these are full.
        slot: its number in the batch, None while it waits.
        scores: whether the logits of its tokens are still wanted. It shares nobody's blocks then.
    """

    @property
    def caller(self) -> Caller: ...

    @property
    def waits(self) -> bool: ...

    tokens: list[int]
    unknown: int
    longest: int
    table: BlockTable
    computed: int
    registered: int
    slot: int | None
    scores: bool


S = TypeVar("S", bound=Scheduled)


class Scheduler(Generic[S]):
    """Decides which tokens the next step computes, and owns the blocks of the cache.

    Sequences that decode go first, one token each; what is left of the step's tokens goes to prompts, prefilled in
    chunks in the order of arrival. So a long prompt delays the others by a bounded time.

    Callers share alike: the next to start is a sequence of the role, and within it of the caller, that has the fewest
    running. Where there is no room for it, one of those that have at least two more gives way; and where the cache is
    full, the youngest of those that have the most. So one's thousand sequences do not make another's one wait for all.

    Nor do they make its steps long: where the owner has any, guests have half as many tokens of a step as he, or
    `Budget.guest_tokens` if that is more, and take turns.

    With `prefix_sharing`, a sequence starts behind those full blocks of its prefix that are in the cache already, or
    that a slice of several tokens fills in the same step: all are written there before any is read.

    A step may be scheduled before the tokens that the steps before it draw are known: a sequence goes on behind an
    `unknown` token, as DRAWN, but starts again after a preemption only once all its tokens are known.
    """

    def __init__(
        self,
        budget: Budget,
        prefix_sharing: bool = True,
        recompute_beyond: int | None = None,
        most_running: Mapping[str, int] | None = None,
    ) -> None:
        """Schedule for these sizes. A sequence that grows beyond `recompute_beyond` tokens is computed anew, once.

        No more sequences of a role run at once than `most_running` says, where it does.
        """
        self.allocator = BlockAllocator(budget.num_blocks + 1, budget.page_size)
        self._budget = budget
        self._prefix_sharing = prefix_sharing
        self._recompute_beyond = recompute_beyond
        self._most_running = most_running or {}
        self._turns = itertools.count(1)
        self._latest: dict[S, int] = {}
        """Of each that runs, its latest turn."""
        # Those that have been computed while they were no longer than that.
        self._short: set[S] = set()
        self._running: list[S] = []
        self._shares = _Shares()
        self._waiting: _Waiting[S] = _Waiting()
        self.prefix_queries = self.prefix_hits = 0
        """Tokens that sequences have looked for, and found, in what the cache holds, when they started."""
        self._preemptions = 0
        self._had_no_room = False
        """Whether the next that waits found none in the last step that had tokens left for it."""
        self._slots = list(range(budget.max_batch_size - 1, -1, -1))

    def add(self, sequence: S, first: bool = False) -> None:
        """Let a sequence wait for its start; `first` is before the others of its caller."""
        self._waiting.add(sequence, first)

    def has_work(self) -> bool:
        """Return whether any sequence waits or runs."""
        return bool(self._running or len(self._waiting))

    @property
    def waits(self) -> bool:
        """Whether a sequence that runs waits."""
        return any(sequence.waits for sequence in self._running)

    def remove(self, sequences: Sequence[S]) -> None:
        """Forget sequences, whatever their state, and free their blocks."""
        for sequence in sequences:
            if sequence in self._running:
                self._stop(sequence)
            else:
                self._waiting.discard(sequence)

    def invalidate(self, blocks: Iterable[int]) -> None:
        """Let nobody else share what lies in the blocks of a slice, and have it zeroed: it is not finite.

        The sequence may have ended since then, and the blocks be another's: that one's are not shared either.
        """
        self.allocator.invalidate(blocks)

    def schedule(self) -> tuple[Step, list[S]]:
        """Return the next step and the sequences of its slices, none if all wait for tokens that are being drawn."""
        room = self._room()
        for sequence in [one for one in self._running if one in self._short and not self._is_short(one)]:
            self._preempt(sequence)
        if self._had_no_room:
            self._share_alike()
        preemptions = self._preemptions
        decoding, prefilling = self._at_work()
        counts = dict.fromkeys(self._in_turns(decoding, room), 1)
        # Most of those that decode have room for the token in their last block, and fill none.
        page_size = self._budget.page_size
        beyond = [sequence for sequence in counts if not sequence.computed % page_size]
        for sequence in beyond:
            if sequence in counts:  # those before it may have preempted it
                self._allocate(sequence, 1, counts)
        for sequence, wanted in prefilling:
            count = room.of(sequence, wanted)
            runs = self._preemptions == preemptions or sequence in self._running
            if count > 0 and runs and self._allocate(sequence, count, counts):
                counts[sequence] = count
                room.take(sequence, count)
        # Only now is it certain who keeps the blocks that this step fills.
        for sequence in (*beyond, *(sequence for sequence, _ in prefilling)):
            if sequence in counts:
                self._register(sequence, counts[sequence])
        admitted: set[S] = set()
        if self._preemptions == preemptions:  # so there may be blocks for others
            admitted = self._admit(room, counts)
        if self._recompute_beyond is not None:
            self._short.update(filter(self._is_short, counts))
        if self._shares.of_role(GUEST):
            self._latest.update(zip(filter(_is_guest, counts), self._turns, strict=False))
        return self._step(counts, admitted)

    def _step(self, counts: dict[S, int], fresh: set[S]) -> tuple[Step, list[S]]:
        """Return the step of these counts of tokens, single ones first, and the shorter sequences first of each."""
        chosen = sorted(counts, key=attrgetter("computed"))
        if max(counts.values(), default=1) > 1:
            chosen.sort(key=lambda one: counts[one] > 1)
        taken = [counts[one] for one in chosen]
        singles = taken.count(1)
        # What is drawn, or will be, comes last of a sequence, and alone.
        token_ids = [DRAWN if one.unknown else one.tokens[one.computed] for one in chosen[:singles]]
        for one in chosen[singles:]:
            token_ids += one.tokens[one.computed : one.computed + counts[one]]
        starts = numbers([one.computed for one in chosen])
        lengths = numbers([len(one.tokens) + one.unknown for one in chosen])
        sample = starts + numbers(taken) == lengths
        step = Step(
            starts=starts,
            counts=numbers(taken),
            slots=numbers([one.slot or 0 for one in chosen]),
            lengths=lengths,
            sample=sample,
            fresh=flags([one in fresh for one in chosen]),
            scores=flags([one.scores for one in chosen]),
            token_ids=numbers(token_ids),
            tables=[one.table for one in chosen],
            clear=self.allocator.take_dirty() if chosen else (),
        )
        for one, count, samples in zip(chosen, taken, sample.tolist(), strict=True):
            one.computed += count
            one.unknown += samples
        return step, chosen

    def _room(self) -> _Room:
        """Return what there is in a step, and of that for guests."""
        tokens = self._budget.max_batch_tokens
        if not (self._waiting.has(OWNER) or self._shares.of_role(OWNER)):
            return _Room(tokens, MOST_SCORES, tokens)
        # Their prompts could find no room for ever.
        prompts = (self._waiting.has(GUEST) and not self._had_no_room) or (
            self._shares.of_role(GUEST) > 0 and any(_missing(one) > 1 for one in filter(_is_guest, self._running))
        )
        return _Room(tokens, MOST_SCORES, self._budget.guest_tokens, shared_with_prompts=prompts)

    def _at_work(self) -> tuple[list[S], list[tuple[S, int]]]:
        """Return those that decode, and those that prefill with how many tokens they lack."""
        decoding, prefilling = [], []
        for sequence in self._running:
            missing = _missing(sequence)
            if missing == 1 and not sequence.scores:
                decoding.append(sequence)
            elif missing:
                prefilling.append((sequence, missing))
        return decoding, prefilling

    def _in_turns(self, decoding: list[S], room: _Room) -> list[S]:
        """Return those that decode now, the guests among them behind the owner's and in turns, and take their room."""
        if not self._shares.of_role(GUEST):
            return decoding[: room.decode(OWNER, len(decoding))]
        owners = list(itertools.filterfalse(_is_guest, decoding))
        guests = sorted(filter(_is_guest, decoding), key=lambda sequence: self._latest.get(sequence, 0))
        owners = owners[: room.decode(OWNER, len(owners))]
        return owners + guests[: room.decode(GUEST, len(guests))]

    def _next(self, room: _Room | None = None) -> S | None:
        """Return the next that is to start, of a role that may have more running, and has room in the step."""
        full = {role for role, most in self._most_running.items() if self._shares.of_role(role) >= most}
        if room is not None and room.is_full_of_guests:
            full.add(GUEST)
        return self._waiting.next(self._shares, full)

    def _share_alike(self) -> None:
        """Make room for the next that waits, where another caller has more than his share."""
        self._had_no_room = False
        sequence = self._next()
        if sequence is not None:
            over = [one for one in self._running if self._shares.exceeds(one.caller, sequence.caller)]
            if over:
                self._preempt(self._shares.youngest_of_the_most(over))

    def _preempt(self, sequence: S) -> None:
        self._preemptions += 1
        self._stop(sequence)
        self._waiting.add(sequence, first=True)

    def _stop(self, sequence: S) -> None:
        self._running.remove(sequence)
        self._shares.remove(sequence.caller)
        self._release(sequence)
        self._short.discard(sequence)
        self._latest.pop(sequence, None)
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
            sequence.slot = None

    def _admit(self, room: _Room, counts: dict[S, int]) -> set[S]:
        """Start sequences that wait, in their order, and return them."""
        admitted = set()
        while room.tokens and (sequence := self._next(room)) and not sequence.unknown:
            if not self._slots:
                self._had_no_room = True
                break
            # The last token is computed in any case: the next one is drawn from its logits.
            shareable = [] if sequence.scores else sequence.tokens[:-1]
            sequence.table = self.allocator.share(shareable)
            sequence.computed = sequence.registered = len(sequence.table) * self._budget.page_size
            count = room.of(sequence, len(sequence.tokens) - sequence.computed)
            if not count or not self._grow(sequence, count):
                self._release(sequence)
                self._had_no_room = True
                break
            self.prefix_queries += len(shareable)
            self.prefix_hits += sequence.computed
            sequence.slot = self._slots.pop()
            self._waiting.start(sequence)
            self._running.append(sequence)
            self._shares.add(sequence.caller)
            admitted.add(sequence)
            counts[sequence] = count
            room.take(sequence, count)
            self._register(sequence, count)
        return admitted

    def _allocate(self, sequence: S, count: int, counts: dict[S, int]) -> bool:
        """Get blocks for a sequence, preempting others if need be; return False if it is itself the one."""
        while not self._grow(sequence, count):
            youngest = self._shares.youngest_of_the_most(self._running)
            _log.debug("preempted a sequence of %d tokens: the KV cache is full", len(youngest.tokens))
            counts.pop(youngest, None)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: S, count: int) -> bool:
        table = self.allocator.allocate(sequence.table, sequence.computed + count)
        sequence.table = sequence.table if table is None else table
        return table is not None

    def _register(self, sequence: S, count: int) -> None:
        """Register what a sequence has filled, and fills with so many tokens; of one that is not known yet, once it is.

        And of a single token in the next step: what decodes may be read before others are written.
        """
        end = min(sequence.computed + (count if count > 1 else 0), len(sequence.tokens))
        if self._prefix_sharing:
            self.allocator.register(sequence.table, sequence.tokens, sequence.registered, end)
        sequence.registered = end

    def _release(self, sequence: S) -> None:
        self.allocator.release(sequence.table)
        sequence.table = ()
        sequence.computed = sequence.registered = 0

    def _is_short(self, sequence: S) -> bool:
        length = len(sequence.tokens) + sequence.unknown
        return self._recompute_beyond is not None and length <= self._recompute_beyond


class _Shares:
    """How many sequences run of each role, and of each caller."""

    def __init__(self) -> None:
        self._counts: Counter[Caller | str] = Counter()

    def add(self, caller: Caller) -> None:
        """Count one more of a caller's."""
        self._counts.update((caller, caller[0]))

    def remove(self, caller: Caller) -> None:
        """Count one less of a caller's."""
        self._counts[caller[0]] -= 1
        self._counts[caller] -= 1
        if not self._counts[caller]:
            del self._counts[caller]

    def of_role(self, role: str) -> int:
        """Return how many of a role run."""
        return self._counts[role]

    def of(self, caller: Caller) -> tuple[int, int]:
        """Return a caller's share: his role's, then his own."""
        return self._counts[caller[0]], self._counts[caller]

    def youngest_of_the_most(self, running: Sequence[S]) -> S:
        """Return the last sequence of the caller who has the most."""
        return max(reversed(running), key=lambda sequence: self.of(sequence.caller))

    def exceeds(self, caller: Caller, other: Caller) -> bool:
        """Whether a caller who gives one to another still has as many."""
        one, two = (caller, other) if caller[0] == other[0] else (caller[0], other[0])
        return self._counts[one] > self._counts[two] + 1


class _Waiting(Generic[S]):
    """Sequences that wait for their start, in a line for each caller."""

    def __init__(self) -> None:
        self._lines: dict[Caller, deque[S]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, sequence: S, first: bool) -> None:
        """Add one at the end of its caller's line, or at its beginning."""
        line = self._lines.setdefault(sequence.caller, deque())
        line.appendleft(sequence) if first else line.append(sequence)

    def discard(self, sequence: S) -> None:
        """Remove one, if it is there."""
        line = self._lines.get(sequence.caller, deque())
        if sequence in line:
            line.remove(sequence)
        if not line:
            self._lines.pop(sequence.caller, None)

    def has(self, role: str) -> bool:
        """Whether any waits for a caller of that role."""
        return any(caller[0] == role for caller in self._lines)

    def next(self, shares: _Shares, but_for: Set[str]) -> S | None:
        """Return the first in the line of the caller who has the fewest running, `but_for` these roles, or None."""
        callers = [caller for caller in self._lines if caller[0] not in but_for]
        if len(callers) < 2:
            return self._lines[callers[0]][0] if callers else None
        return self._lines[min(callers, key=shares.of)][0]

    def start(self, sequence: S) -> None:
        """Remove the first of a line, which is behind the others with as many then."""
        line = self._lines.pop(sequence.caller)
        line.popleft()
        if line:
            self._lines[sequence.caller] = line


@dataclass
class _Room:
    """What is left of a step, in tokens.

    Guests have half as many as the owner, or `for_guests`; where they have prompts, too, these have half of that.
    """

    tokens: int
    scores: int
    for_guests: int
    shared_with_prompts: bool = False
    _taken: Counter[str] = field(default_factory=Counter)

    @property
    def is_full_of_guests(self) -> bool:
        """Whether no more is left for prompts of guests."""
        return self._left_for_guests <= 0

    def decode(self, role: str, wanted: int) -> int:
        """Give a token each to so many sequences of a role, which are its first; return how many of them get one."""
        count = min(wanted, self.tokens)
        if role == GUEST:
            left = self._left_for_guests
            count = min(count, (left + 1) // 2 if self.shared_with_prompts else left)
        self.tokens -= count
        self._taken[role] += count
        return count

    def of(self, sequence: Scheduled, wanted: int) -> int:
        """Return how many of the tokens that a sequence wants for its prompt it can have."""
        wanted = min(wanted, self.tokens, self.scores) if sequence.scores else min(wanted, self.tokens)
        return min(wanted, self._left_for_guests) if _is_guest(sequence) else wanted

    def take(self, sequence: Scheduled, count: int) -> None:
        """Give a sequence tokens."""
        self.tokens -= count
        self.scores -= count * sequence.scores
        self._taken[sequence.caller[0]] += count

    @property
    def _left_for_guests(self) -> int:
        return max(self.for_guests, self._taken[OWNER] // 2) - self._taken[GUEST]


def _missing(sequence: Scheduled) -> int:
    """Return how many tokens of a running sequence are to be computed now; none if the last one is drawn already."""
    if sequence.waits:
        return 0
    length = len(sequence.tokens) + sequence.unknown
    return length - sequence.computed if length < sequence.longest or not sequence.unknown else 0


def _is_guest(sequence: Scheduled) -> bool:
    return sequence.caller[0] == GUEST
