from types import SimpleNamespace

import pytest

from mii_hpc.rpc import liveness
from mii_hpc.rpc.liveness import BEAT_SECONDS, SILENT_SECONDS, Pulse


class Clock:
    """Time that passes while somebody sleeps; `during` is called in the middle of each sleep."""

    def __init__(self, monkeypatch, during=lambda: None):
        self.now, self.during = 100.0, during
        monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(liveness, "asyncio", SimpleNamespace(sleep=self.sleep))

    async def sleep(self, seconds):
        self.now += seconds / 2
        self.during()
        self.now += seconds / 2


@pytest.mark.parametrize("beats", [0, 1, 3])
async def test_a_process_is_lost_so_long_after_its_last_sign_of_life(monkeypatch, beats):
    clock = Clock(monkeypatch)
    pulse, last = Pulse(), [clock.now]

    def beat():
        if len(last) <= beats:
            pulse.beat()
            last.append(clock.now)

    clock.during = beat
    await pulse.lost()
    assert clock.now - last[-1] == pytest.approx(SILENT_SECONDS)
    assert SILENT_SECONDS < 10 and len(last) == beats + 1


async def test_who_was_stopped_itself_judges_nobody(monkeypatch):
    clock = Clock(monkeypatch)
    pulse, sleeps = Pulse(), []

    def stop():
        sleeps.append(clock.now)
        if len(sleeps) == 2:
            clock.now += 3600

    clock.during = stop
    await pulse.lost()
    assert clock.now - 100 == pytest.approx(3600 + SILENT_SECONDS)
    assert len(sleeps) >= SILENT_SECONDS // BEAT_SECONDS
