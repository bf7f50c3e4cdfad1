import asyncio

import pytest

from mii_hpc.job.tasks import Tasks
from tests.waiting import PATIENCE


async def fails():
    raise ValueError("a bug")


async def test_a_task_that_fails_ends_the_work_with_its_reason():
    tasks = Tasks()
    other = tasks.start(asyncio.sleep(2 * PATIENCE))
    work = asyncio.create_task(asyncio.sleep(2 * PATIENCE))

    async def process():
        await work

    tasks.start(fails())
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(tasks.guard(process()), PATIENCE)
    assert work.cancelled() and other.cancelled()


async def test_a_task_that_failed_before_anybody_looked_is_noticed():
    tasks = Tasks()
    await asyncio.wait({tasks.start(fails())})
    with pytest.raises(ValueError, match="a bug"):
        await asyncio.wait_for(tasks.guard(asyncio.sleep(2 * PATIENCE)), PATIENCE)


async def test_the_work_s_end_ends_the_tasks():
    tasks = Tasks()
    background, ended = tasks.start(asyncio.sleep(2 * PATIENCE)), tasks.start(asyncio.sleep(0))
    cancelled = tasks.start(asyncio.sleep(2 * PATIENCE))
    cancelled.cancel()
    assert await tasks.guard(asyncio.sleep(0.01, "done")) == "done"
    assert background.cancelled() and ended.done()
