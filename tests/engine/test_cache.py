import os
import random
from pathlib import Path

import pytest

from mii_hpc.engine.cache import NULL_BLOCK, BlockAllocator, LayerShape, PagedCache
from mii_hpc.engine.step import Slice, Step


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
            if allocator.grow(table, tokens):
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


def test_a_step_survives_its_way_to_the_other_ranks():
    step = Step(
        slices=(
            Slice(start=7, token_ids=(3,), blocks=(1, 2), sample=True),
            Slice(start=0, token_ids=(4, 5, 6), blocks=(9,), sample=False),
        ),
        clear=(5, 6),
    )
    assert Step.decode(step.encode()) == step
    assert Step.decode(Step(stop=True).encode()).stop
    assert step.wanted == 1


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
