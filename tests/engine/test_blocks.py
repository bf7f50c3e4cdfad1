import os
import random
from pathlib import Path

import pytest

from mii_hpc.engine.blocks import NULL_BLOCK, BlockAllocator, LayerShape, PagedCache


def test_blocks_belong_to_one_table_and_come_back():
    draw = random.Random(0)
    allocator = BlockAllocator(num_blocks=33, page_size=4)
    tables = [()] * 8
    for _ in range(1000):
        place = draw.randrange(8)
        before = tables[place]
        if draw.random() < 0.3:
            allocator.release(before)
            tables[place] = ()
        else:
            tokens = draw.randrange(1, 60)
            table = allocator.allocate(before, tokens)
            if table is not None:
                assert len(table) == max(len(before), -(-tokens // 4))
                assert table[: len(before)] == before
                tables[place] = table
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
    tokens = list(text)
    found = allocator.share(tokens)
    table = allocator.allocate(found, len(tokens))
    allocator.register(table, tokens, 2 * len(found), len(tokens))
    return table


def shared(allocator, text):
    found = allocator.share(list(text))
    allocator.release(found)
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
    assert shared(allocator, b"bb") == ()
    assert shared(allocator, b"a") == ()


def test_blocks_are_shared_after_their_release_until_they_are_handed_out(allocator):
    first, second = table_of(allocator, b"aabb"), table_of(allocator, b"ccdd")
    allocator.release(first)
    allocator.release(second)
    assert allocator.free == 8
    assert shared(allocator, b"aabb") == first  # so these were used last
    table = allocator.allocate((), 8)
    assert not set(table) & {*first, *second}
    table = allocator.allocate(table, 12)
    assert table[4:] == second[::-1]  # the beginning last, for more can share it
    table = allocator.allocate(table, 14)
    assert shared(allocator, b"aabb") == first[:1]
    allocator.allocate(table, 16)
    assert shared(allocator, b"aabb") == ()
    assert allocator.free == 0


def test_the_same_tokens_computed_twice_are_kept_once(allocator):
    first, second = (allocator.allocate((), 4) for _ in range(2))  # both before either was registered
    for table in (first, second):
        allocator.register(table, list(b"aabb"), 0, 4)
    allocator.release(second)
    assert shared(allocator, b"aabb") == first
    allocator.release(first)
    assert not set(allocator.allocate((), 12)) & set(first)


def test_a_duplicate_is_shared_once_the_first_is_gone(allocator):
    first, second = (allocator.allocate((), 4) for _ in range(2))
    for table in (first, second):
        allocator.register(table, list(b"aabb"), 0, 4)
    allocator.invalidate(first)
    allocator.release(second)
    assert shared(allocator, b"aabb") == second


def test_invalid_blocks_are_not_shared_and_zeroed_once_nobody_has_them(allocator):
    first, second = table_of(allocator, b"aabb"), table_of(allocator, b"aacc")
    allocator.invalidate(first)
    assert shared(allocator, b"aacc") == ()
    assert allocator.take_dirty() == ()
    allocator.release(first)
    assert allocator.take_dirty() == first[1:]
    second = allocator.allocate(second, 6)
    allocator.register(second, list(b"aaccdd"), 4, 6)
    again = table_of(allocator, b"aa")
    assert again != first[:1]
    allocator.release(second)
    assert allocator.take_dirty() == first[:1]
    assert allocator.take_dirty() == ()
    allocator.release(again)
    assert allocator.free == allocator.total


def test_blocks_are_invalid_also_when_nobody_has_them_anymore(allocator):
    table = table_of(allocator, b"aabbc")
    allocator.release(table)
    allocator.invalidate(table)
    assert shared(allocator, b"aabb") == ()
    assert sorted(allocator.take_dirty()) == sorted(table)
    assert allocator.free == allocator.total
    assert sorted(allocator.allocate((), 2 * allocator.total)) == list(range(1, allocator.total + 1))


def test_an_invalid_block_is_not_registered_when_it_is_full(allocator):
    table = allocator.allocate((), 1)
    allocator.invalidate(table)
    table = allocator.allocate(table, 4)
    allocator.register(table, list(b"aabb"), 1, 4)
    assert shared(allocator, b"aabb") == ()
    allocator.release(table)
    assert allocator.take_dirty() == table[:1]


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
