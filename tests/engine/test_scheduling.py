import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from mii_hpc.engine.blocks import NULL_BLOCK
from mii_hpc.engine.memory import Budget
from mii_hpc.engine.scheduling import Scheduler
from mii_hpc.engine.step import DRAWN

PAGE = 4
BAD = 99  # a token whose numbers are not finite, and so are those of all tokens behind it


@dataclass(eq=False)
class Answer:
    tokens: list
    longest: int
    limit: int
    unknown: int = 0
    table: tuple = ()
    computed: int = 0
    registered: int = 0
    slot: int | None = None
    scores: bool = False
    drawn: int = 0
    caller: tuple = ("owner", "")
    number: int = field(default_factory=itertools.count().__next__)
    is_held: bool = False
    """As those that are guided, which wait for their tokens."""

    @property
    def waits(self):
        return self.is_held and self.unknown > 0


class Machine:
    """Executes steps with blocks that remember for each token all tokens up to it, as keys and values do.

    What a step draws is known to the scheduler only after so many more steps are scheduled as the `lag` says.
    """

    def __init__(self, num_blocks=64, max_batch_size=8, max_batch_tokens=16, lag=0, **options):
        self.scheduler = Scheduler(Budget(max_batch_size, max_batch_tokens, PAGE, num_blocks), **options)
        self.blocks = [[()] * PAGE for _ in range(num_blocks + 1)]
        self.answers = set()
        self.computed = 0
        self.lag = lag
        self.begun = deque()
        self.slots = {}

    def add(self, tokens, limit=1, caller=("owner", ""), is_held=False):
        answer = Answer(list(tokens), len(tokens) + limit, limit, caller=caller, is_held=is_held)
        self.answers.add(answer)
        self.scheduler.add(answer)
        return answer

    def drop(self, answer):
        self.answers.remove(answer)
        self.scheduler.remove([answer])

    def step(self):
        step, answers = self.scheduler.schedule()
        assert answers or self.begun
        if answers:
            self.begun.append(self.execute(step, answers))
        if len(self.begun) > (self.lag if answers else 0):
            self.finish_step(*self.begun.popleft())
        self.check()

    def execute(self, step, answers):
        counts = [len(part.token_ids) for part in step.slices]
        assert counts == sorted(counts, key=lambda count: count > 1)
        self.computed += sum(counts)
        for block in step.clear:
            self.blocks[block] = [()] * PAGE
        slots = [part.slot for part in step.slices]
        assert len(set(slots)) == len(slots)
        histories = []
        for part, answer in zip(step.slices, answers, strict=True):
            assert part.slot == answer.slot
            end = part.start + len(part.token_ids)
            # All tokens, also those that the scheduler does not know yet.
            history = [] if part.fresh else self.slots[part.slot]
            history = [*history[: part.start], *part.token_ids] if history else [*answer.tokens[:end]]
            if part.token_ids[-1] == DRAWN:
                assert not answer.is_held
                history[-1] = self.slots[part.slot][part.start]
            assert part.sample == (end == len(answer.tokens) + answer.unknown - part.sample)
            histories.append(history)
        pairs = list(zip(step.slices, histories, strict=True))
        # A slice of several tokens is read when all have written; else each slice may be read before others write.
        together = any(count > 1 for count in counts)
        for part, history in pairs if together else ():
            self.write(part, history)
        outcomes = []
        for part, history in reversed(pairs):
            if not together:
                self.write(part, history)
            end = part.start + len(part.token_ids)
            read = [cell for block in part.blocks[: -(-end // PAGE)] for cell in self.blocks[block]]
            assert read[:end] == [tuple(history[: place + 1]) for place in range(end)]
            bad = BAD in history
            # Padding is read as well, but not by the back end that tokens are known late with.
            assert bad or self.lag or not any(BAD in cell for cell in read)
            outcomes.append((bad, len(history) % 3))
            self.slots[part.slot] = [*history, len(history) % 3] if part.sample else history
        return step, answers, outcomes[::-1]

    def write(self, part, history):
        for place in range(part.start, part.start + len(part.token_ids)):
            self.blocks[part.blocks[place // PAGE]][place % PAGE] = tuple(history[: place + 1])

    def finish_step(self, step, answers, outcomes):
        for part, answer, (bad, token) in zip(step.slices, answers, outcomes, strict=True):
            answer.unknown -= part.sample
            if bad:
                self.scheduler.invalidate(part.blocks)
            if part.sample and answer in self.answers:
                answer.tokens.append(token)
                answer.drawn += 1
                if bad or answer.drawn == answer.limit:
                    self.drop(answer)

    def check(self):
        allocator = self.scheduler.allocator
        owned = {block for answer in self.answers for block in answer.table}
        assert len(owned) == allocator.total - allocator.free
        assert NULL_BLOCK not in owned
        for answer in self.answers:
            assert len(set(answer.table)) == len(answer.table)

    def finish(self):
        while self.scheduler.has_work() or self.begun:
            self.step()
        assert not self.answers
        assert self.scheduler.allocator.free == self.scheduler.allocator.total

    def cost(self, tokens, limit=1):
        """How many tokens an answer takes to compute when nothing else runs."""
        before = self.computed
        self.add(tokens, limit)
        self.finish()
        return self.computed - before


def test_a_prompt_seen_before_costs_only_its_rest():
    machine = Machine()
    assert machine.cost(range(30)) == 30
    assert machine.cost(range(30)) == 30 - 28
    assert machine.cost(range(40)) == 40 - 28
    assert machine.cost(range(1, 31)) == 30


def test_one_token_is_computed_in_any_case():
    machine = Machine()
    assert machine.cost(range(8)) == 8
    assert machine.cost(range(8)) == 4
    assert machine.cost(range(9)) == 1
    assert machine.cost(range(9)) == 1


def test_an_answer_is_shared_by_the_prompt_that_continues_it():
    machine = Machine()
    answer = machine.add(range(6), limit=12)
    machine.finish()
    assert machine.cost(answer.tokens) == 18 - 16


def test_what_runs_together_is_computed_once():
    machine = Machine()
    for _ in range(8):
        machine.add(range(14))
    machine.finish()
    assert machine.computed == 14 + 7 * 2
    for _ in range(8):
        machine.add(range(200, 300))  # in many chunks
    machine.finish()
    assert machine.computed == 28 + 100 + 7 * 4


def test_what_a_single_token_fills_is_shared_from_the_next_step_on():
    machine = Machine(max_batch_tokens=2 * PAGE)
    other = machine.add([1], limit=9)
    machine.step()
    # Of the first prompt, one token is left for the next step. It fills the block that the second prompt wants.
    first = machine.add(range(2 * PAGE), limit=5)
    second = machine.add([*range(2 * PAGE), 0])
    machine.step()
    assert (first.computed, second.computed) == (2 * PAGE - 1, 0)
    machine.step()
    assert first.computed == 2 * PAGE
    assert not set(second.table) & set(first.table[1:])
    assert other in machine.answers
    machine.finish()


def test_without_prefix_sharing_everything_is_computed():
    machine = Machine(prefix_sharing=False)
    assert [machine.cost(range(30)) for _ in range(2)] == [30, 30]


def test_a_sequence_that_had_to_wait_finds_its_blocks_again():
    machine = Machine(num_blocks=8)
    first, second = machine.add(range(12), limit=10), machine.add(range(50, 62), limit=10)
    while not (second.drawn and second.computed == 0):
        machine.step()
    restarted = machine.computed
    length = len(second.tokens)
    while second.computed == 0:
        machine.step()
    assert first not in machine.answers  # it had all the room
    assert second.table
    assert machine.computed - restarted < length
    machine.finish()


def test_the_blocks_of_one_that_waits_for_room_are_not_its_own():
    machine = Machine(num_blocks=4, max_batch_tokens=64)
    machine.cost(range(8))
    first = machine.add(range(50, 56), limit=6)
    machine.step()
    waiting = machine.add(range(14))
    machine.step()
    assert not waiting.table
    assert waiting.computed == 0
    machine.drop(first)
    before = machine.computed
    machine.step()
    assert machine.computed - before == 14 - 8


def test_cancelled_in_the_middle_of_its_prompt_its_blocks_are_shared():
    machine = Machine()
    answer = machine.add(range(60))
    machine.step()
    machine.step()
    machine.drop(answer)
    assert machine.cost(range(60)) == 60 - 32


def test_what_is_not_finite_is_computed_anew_and_by_each_alone():
    machine = Machine()
    machine.cost(range(20))
    bad = [*range(8), BAD, *range(20)]
    assert machine.cost(bad) == 29 - 8
    assert machine.cost(bad) == 29  # what led to it is not trusted anymore
    machine.add(bad)
    good = [machine.add([*range(9), *range(number, 30)], limit=9) for number in range(10, 16)]
    machine.finish()
    assert all(answer.drawn == 9 for answer in good)


def test_what_is_not_finite_is_not_shared_either_when_its_sequence_has_ended_before_that_is_known():
    machine = Machine(lag=1)
    bad = [*range(8), BAD, *range(20)]
    answer = machine.add(bad)
    machine.step()
    machine.drop(answer)
    machine.finish()
    assert machine.cost(bad) == 29


OWNER, GUEST = ("owner", "a"), ("guest", "b")


def test_a_caller_s_thousand_do_not_make_another_s_one_wait():
    """Neither for a place in the batch nor for blocks, however many wait and however long those are that run."""
    for blocks in (400, 9):
        machine = Machine(num_blocks=blocks, max_batch_size=4)
        hogs = [machine.add([number, 1, 2], limit=25, caller=GUEST) for number in range(1000)]
        for _ in range(5):
            machine.step()
        one = machine.add([7, 7], limit=3, caller=OWNER)
        for _ in range(12):
            machine.step()
        assert one.drawn == 3
        for hog in hogs[8:]:
            machine.drop(hog)
        machine.finish()
        assert [hog.drawn for hog in hogs[:8]] == [25] * 8


def test_callers_share_the_batch_alike_and_so_do_the_roles():
    machine = Machine(max_batch_size=4, num_blocks=200)
    callers = [("guest", "b"), ("guest", "c"), ("owner", "a")]
    answers = [machine.add([number, 3], limit=30, caller=callers[0]) for number in range(20)]
    for _ in range(3):
        machine.step()
    answers += [machine.add([number, 3], limit=30, caller=caller) for caller in callers[1:] for number in range(20, 24)]
    for _ in range(6):
        machine.step()
    assert sorted(answer.caller for answer in answers if answer.slot is not None) == sorted([*callers, callers[2]])
    for answer in answers:
        if answer in machine.answers:
            machine.drop(answer)


def test_beside_the_owner_guests_have_a_part_of_each_step():
    """Half as many tokens as he, or so few that a step takes little longer; all have their turns."""
    machine = Machine(max_batch_size=16, max_batch_tokens=64, num_blocks=400)
    guests = [machine.add([number, 1], limit=30, caller=GUEST) for number in range(12)]
    machine.step()
    machine.step()
    assert [guest.drawn for guest in guests] == [2] * 12, "alone they have everything"
    owners = [machine.add([number, 2], limit=6, caller=OWNER) for number in range(20, 22)]
    before = machine.computed
    for _ in range(6):
        machine.step()
    assert [owner.drawn for owner in owners] == [6, 6]
    assert machine.computed - before == 7 * 2 + 6 * 4, "two tokens of the owner's a step, four of the guests'"
    assert [guest.drawn for guest in guests] == [4] * 12
    machine.add([22, 2], limit=30, caller=OWNER)
    prompt = machine.add(range(100, 140), caller=GUEST)
    for _ in range(20):
        machine.step()
    assert prompt.drawn == 1, "half of what guests have is for their prompts"
    assert {guest.drawn for guest in guests} <= {7, 8}
    long = machine.add(range(200, 240), limit=2, caller=OWNER)
    before = machine.computed
    machine.step()
    assert (machine.computed - before, long.drawn) == (40 + 1 + 4, 1), "a prompt of the owner's goes whole"
    machine.finish()


def test_a_role_has_no_more_running_than_its_quota():
    machine = Machine(max_batch_size=8, num_blocks=200, most_running={"guest": 3})
    guests = [machine.add([number, 1], limit=5, caller=GUEST) for number in range(10)]
    owners = [machine.add([number, 1], limit=5, caller=OWNER) for number in range(20, 30)]
    while machine.answers:
        machine.step()
        assert sum(guest.slot is not None for guest in guests) <= 3
    assert all(answer.drawn == 5 for answer in (*guests, *owners))


def test_alone_a_caller_has_everything_in_the_order_of_arrival():
    machine = Machine(max_batch_size=4)
    answers = [machine.add([number], limit=5) for number in range(8)]
    machine.step()
    assert [answer.slot is not None for answer in answers] == [True] * 4 + [False] * 4
    machine.finish()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_nobody_ever_reads_what_is_not_his(seed, lag):
    draw = random.Random(seed)
    machine = Machine(
        num_blocks=draw.randrange(10, 60),
        max_batch_size=draw.randrange(1, 9),
        max_batch_tokens=draw.randrange(9, 40),
        prefix_sharing=seed % 5 != 0,
        lag=lag,
    )
    beginnings = [[draw.randrange(3) for _ in range(20)] for _ in range(3)]
    for _ in range(400):
        if draw.random() < 0.4:
            tokens = draw.choice(beginnings)[: draw.randrange(21)] + [
                draw.randrange(3) for _ in range(draw.randrange(1, 6))
            ]
            if draw.random() < 0.1:
                tokens.insert(draw.randrange(len(tokens)), BAD)
            caller = draw.choice("ab"), draw.choice("cd")
            machine.add(tokens, draw.randrange(1, 14), caller, is_held=draw.random() < 0.2)
        if machine.answers and draw.random() < 0.05:
            machine.drop(draw.choice(sorted(machine.answers, key=lambda answer: answer.number)))
            machine.check()
        if machine.scheduler.has_work() or machine.begun:
            machine.step()
    machine.finish()
