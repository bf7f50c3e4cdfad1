import os
import random
from pathlib import Path

import pytest

from mii_hpc.engine.blocks import NULL_BLOCK, BlockAllocator, LayerShape, PagedCache
from mii_hpc.engine.step import DRAWN, Slice, Step, StepCodec


def test_blocks_belong_to_one_table_and_come_back():
    draw = random.Random(0)
    allocator = BlockAllocator(num_blocks=33, page_size=4)
    tables = [[] for _ in range(8)]
    for _ in range(1000):
        table = draw.choice(tables)
        if draw.random() < 0.3:
            allocator.release(table)
        else:
            before = len(table)
            tokens = draw.randrange(1, 60)
            if allocator.allocate(table, tokens):
                assert len(table) == max(before, -(-tokens // 4))
            else:
                assert len(table) == before
        owned = [block for table in tables for block in table]
        assert len(owned) == len(set(owned)) == allocator.total - allocator.free
        assert NULL_BLOCK not in owned
    for table in tables:
        allocator.release(table)
    assert allocator.free == allocator.total == 32
    assert allocator.capacity == 128


def test_a_cache_needs_a_block():
    with pytest.raises(ValueError, match="at least 2"):
        BlockAllocator(num_blocks=1, page_size=4)


@pytest.fixture
def allocator():
    return BlockAllocator(num_blocks=9, page_size=2)


def table_of(allocator, text):
    """A table for tokens of which those that could not be shared were computed and registered."""
    tokens, table = list(text), []
    start = allocator.share(table, tokens)
    assert allocator.allocate(table, len(tokens))
    allocator.register(table, tokens, start, len(tokens))
    return table


def shared(allocator, text):
    table = []
    assert allocator.share(table, list(text)) == 2 * len(table)
    found = list(table)
    allocator.release(table)
    return found


def test_full_blocks_of_the_same_beginning_are_shared(allocator):
    table = table_of(allocator, b"aabbc")
    other = table_of(allocator, b"aabbccd")
    assert other[:2] == table[:2]
    assert not set(other[2:]) & set(table)
    assert allocator.free == 8 - 5
    allocator.release(table)
    assert allocator.free == 8 - 4
    assert shared(allocator, b"aabbcc") == other[:3]
    assert shared(allocator, b"bb") == []
    assert shared(allocator, b"a") == []


def test_blocks_are_shared_after_their_release_until_they_are_handed_out(allocator):
    first, second = table_of(allocator, b"aabb"), table_of(allocator, b"ccdd")
    kept = {"a": list(first), "c": list(second)}
    allocator.release(first)
    allocator.release(second)
    assert allocator.free == 8
    assert shared(allocator, b"aabb") == kept["a"]  # so these were used last
    table = []
    allocator.allocate(table, 8)
    assert not set(table) & {*kept["a"], *kept["c"]}
    allocator.allocate(table, 12)
    assert table[4:] == kept["c"][::-1]  # the beginning last, for more can share it
    allocator.allocate(table, 14)
    assert shared(allocator, b"aabb") == kept["a"][:1]
    allocator.allocate(table, 16)
    assert shared(allocator, b"aabb") == []
    assert allocator.free == 0


def test_the_same_tokens_computed_twice_are_kept_once(allocator):
    first, second = [], []
    for table in (first, second):  # both before either was registered
        allocator.allocate(table, 4)
    kept = list(first)
    for table in (first, second):
        allocator.register(table, list(b"aabb"), 0, 4)
    allocator.release(second)
    assert shared(allocator, b"aabb") == kept
    allocator.release(first)
    fresh = []
    allocator.allocate(fresh, 12)
    assert not set(fresh) & set(kept)


def test_a_duplicate_is_shared_once_the_first_is_gone(allocator):
    first, second = [], []
    for table in (first, second):
        allocator.allocate(table, 4)
    for table in (first, second):
        allocator.register(table, list(b"aabb"), 0, 4)
    allocator.invalidate(first)
    kept = list(second)
    allocator.release(second)
    assert shared(allocator, b"aabb") == kept


def test_invalid_blocks_are_not_shared_and_zeroed_once_nobody_has_them(allocator):
    first, second = table_of(allocator, b"aabb"), table_of(allocator, b"aacc")
    blocks = list(first)
    allocator.invalidate(first)
    assert shared(allocator, b"aacc") == []
    assert allocator.take_dirty() == ()
    allocator.release(first)
    assert allocator.take_dirty() == (blocks[1],)
    allocator.allocate(second, 6)
    allocator.register(second, list(b"aaccdd"), 4, 6)
    again = table_of(allocator, b"aa")
    assert again != blocks[:1]
    allocator.release(second)
    assert allocator.take_dirty() == (blocks[0],)
    assert allocator.take_dirty() == ()
    allocator.release(again)
    assert allocator.free == allocator.total


def test_blocks_are_invalid_also_when_nobody_has_them_anymore(allocator):
    table = table_of(allocator, b"aabbc")
    blocks = list(table)
    allocator.release(table)
    allocator.invalidate(blocks)
    assert shared(allocator, b"aabb") == []
    assert sorted(allocator.take_dirty()) == sorted(blocks)
    assert allocator.free == allocator.total
    allocator.allocate(table, 2 * allocator.total)
    assert sorted(table) == list(range(1, allocator.total + 1))


def test_an_invalid_block_is_not_registered_when_it_is_full(allocator):
    table = []
    allocator.allocate(table, 1)
    allocator.invalidate(table)
    allocator.allocate(table, 4)
    allocator.register(table, list(b"aabb"), 1, 4)
    assert shared(allocator, b"aabb") == []
    blocks = list(table)
    allocator.release(table)
    assert allocator.take_dirty() == (blocks[0],)


def test_steps_survive_their_way_to_the_other_ranks():
    steps = [
        Step(
            slices=(
                Slice(start=7, token_ids=(3,), blocks=(1, 2), sample=True),
                Slice(start=0, token_ids=(4, 5, 6), blocks=(9,), sample=False, slot=2, scores=True),
            ),
            clear=(5, 6),
        ),
        Step((Slice(8, (DRAWN,), (1, 2, 3), True, 0, fresh=False), Slice(3, (7,), (9,), True, 2, fresh=False))),
        Step((Slice(4, (DRAWN,), (9, 4), True, 2, fresh=False), Slice(0, (1, 2), (5,), True, 0))),
        Step(stop=True),
    ]
    leader, follower = StepCodec(), StepCodec()
    assert [follower.decode(leader.encode(step)) for step in steps] == steps
    assert [step.num_samples for step in steps] == [1, 2, 2, 0]
    assert [step.decodes for step in steps] == [False, True, False, False]


def test_a_step_that_goes_on_is_small():
    codec = StepCodec()
    table = tuple(range(1000))
    codec.encode(Step((Slice(start=999, token_ids=(3,), blocks=table, sample=True),)))
    assert len(codec.encode(Step((Slice(1000, (DRAWN,), (*table, 1000), True, fresh=False),)))) == 11


@pytest.mark.engine
def test_on_cpu_a_cache_takes_memory_only_as_it_is_written():
    torch = pytest.importorskip("torch")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    layer = LayerShape((8, 64), (8, 64), torch.bfloat16)
    before = resident()
    cache = PagedCache([layer] * 4, num_blocks=4096, page_size=32, device=torch.device("cpu"))  # of 1 GiB
    cache.keys[0][5] = 1
    assert resident() - before < 100 * 2**20
    assert cache.keys[0][5].min() == 1
    assert not cache.values[3][4095].any()
