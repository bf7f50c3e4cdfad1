import asyncio
from types import SimpleNamespace

import pytest

from mii_hpc.errors import QueueFullError
from mii_hpc.job.balancer import pace
from mii_hpc.job.balancer.pace import LONG_BYTES, Pace


async def test_long_requests_go_on_one_after_the_other(monkeypatch):
    now, slept = 100.0, []

    async def sleep(seconds):
        nonlocal now
        slept.append(max(seconds, 0.0))
        now += slept[-1]

    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(pace, "asyncio", SimpleNamespace(sleep=sleep, Lock=asyncio.Lock))
    kept = Pace(most=100 * LONG_BYTES)
    for size in (LONG_BYTES - 1, 4 * LONG_BYTES, LONG_BYTES, LONG_BYTES):
        await kept.keep(size)
    second = LONG_BYTES / pace.BYTES_PER_SECOND
    assert slept == pytest.approx([0, 4 * second, second])


async def test_so_many_bytes_wait_and_no_more(monkeypatch):
    monkeypatch.setattr(pace, "BYTES_PER_SECOND", 1)
    kept = Pace(most=2 * LONG_BYTES)
    await kept.keep(5 * LONG_BYTES)  # the first waits for none, however long it is
    waiting = [asyncio.create_task(kept.keep(LONG_BYTES)) for _ in range(2)]
    await asyncio.sleep(0)
    refusal = r"^131072 bytes of long requests are waiting, 65536 are to come, and limits\.guest_waiting_bytes=131072"
    with pytest.raises(QueueFullError, match=refusal):
        await kept.keep(LONG_BYTES)
    await kept.keep(LONG_BYTES - 1)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    again = asyncio.create_task(kept.keep(2 * LONG_BYTES))
    await asyncio.sleep(0)
    assert not again.done(), "those that have left make room"
    again.cancel()
