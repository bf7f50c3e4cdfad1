import asyncio
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mii_hpc.errors import DeploymentFailedError, ReplicaLostError
from mii_hpc.job import supervisor
from mii_hpc.job.rendezvous import Member, World
from mii_hpc.job.supervisor import AbandonedError, keep_balancer
from mii_hpc.placement import role_of
from mii_hpc.rpc import liveness
from mii_hpc.submission import submit as submission
from tests.waiting import PATIENCE, until


class Crashing:
    """A balancer process that ends at once."""

    def __init__(self, log):
        self.log = log

    async def next_note(self):
        return None

    async def wait(self):
        self.log.write_text("Traceback ...\nValueError: a bug\n")
        return 1


async def test_a_balancer_that_crashes_again_and_again_ends_the_deployment(echo_config, monkeypatch):
    run, _ = submission.prepare(echo_config())
    world = World(role_of(0, 1), (Member(0, "node0", "127.0.0.1"),))
    started = []

    async def start(*_args, log, **_kwargs):
        started.append(log)
        return Crashing(log)

    monkeypatch.setattr(supervisor.Child, "start", start)
    with pytest.raises(
        DeploymentFailedError, match=r"^the balancer ended with status 1, 5 times in a row: ValueError: a bug$"
    ):
        await asyncio.wait_for(keep_balancer(run, world, "127.0.0.1:1"), PATIENCE)
    assert len(started) == 5


async def test_a_watcher_that_fails_ends_the_rank(deploy):
    """Here: a child that says what is no note."""
    deployment = await deploy(replica_num=2)
    rank = deployment.ranks[1]
    rank.engine._notes.put_nowait(7)
    with pytest.raises(TypeError):
        await asyncio.wait_for(deployment.tasks[1], PATIENCE)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.5)


TALKING = """
import time
from mii_hpc.job.process import tell
tell(alive="")
tell(ready="here")
while True:
    tell(alive="")
    time.sleep(0.05)
"""


async def test_a_child_that_is_stopped_is_killed_and_told_of(tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 5.0)  # longer than a busy machine keeps it from talking
    (tmp_path / "talking.py").write_text(TALKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child, notes = await supervisor.Child.start("talking", log=tmp_path / "log"), []
    hearing = asyncio.create_task(supervisor.hear(child, notes.append))
    await until(lambda: notes == [{"ready": "here"}])
    os.kill(child.pid, signal.SIGSTOP)
    assert await asyncio.wait_for(hearing, PATIENCE) == "gave no sign of life for 5 s, and was killed"


async def test_an_engine_that_makes_no_step_fails(deploy, impatient, monkeypatch):
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 5.0)  # longer than a busy machine keeps anybody from talking
    deployment = await deploy(replica_num=1, echo_delay=0.01, migration_limit=0, step_timeout=2)
    engine = deployment.ranks[0].engine.engine
    asking = asyncio.create_task(deployment.client().generate("a", max_new_tokens=10**6))
    await until(lambda: engine.stats().running)
    monkeypatch.setattr(type(engine), "_step", lambda *_: time.sleep(0.001))
    monkeypatch.setattr(type(engine), "steps", property(lambda _self: 7, lambda _self, _value: None), raising=False)
    await until(lambda: len(deployment.ranks[0].epochs) >= 2)
    with pytest.raises(ReplicaLostError):
        await asking


async def test_without_a_balancer_others_start_rank_0_again_and_then_give_up(deploy, monkeypatch):
    monkeypatch.setattr(supervisor, "REVIVE_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "BALANCER_DEADLINE_SECONDS", 1.0)
    deployment = await deploy(replica_num=1)
    revived, ticks = [], itertools.count(0, 0.4)
    deployment.ranks[0].revive = lambda: revived.append(True)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    await deployment.balancer.server.stop(None)
    with pytest.raises(AbandonedError, match=r"^rank 0: no balancer at .* for [0-9]+ s$"):
        await asyncio.wait_for(deployment.tasks[0], PATIENCE)
    assert revived == [True, True]


async def test_where_the_balancers_host_is_gone_nobody_waits_for_it(deploy, monkeypatch):
    asked = []

    async def host_answers(address):
        asked.append(address)
        return False

    monkeypatch.setattr(supervisor, "HOST_DEADLINE_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "BALANCER_DEADLINE_SECONDS", 3600.0)
    monkeypatch.setattr(supervisor, "host_answers", host_answers)
    deployment = await deploy(replica_num=1)
    await deployment.balancer.server.stop(None)
    with pytest.raises(AbandonedError):
        await asyncio.wait_for(deployment.tasks[0], PATIENCE)
    assert asked == [deployment.ranks[0].address]


async def test_a_rank_that_alone_reaches_no_balancer_ends_nothing(deploy, monkeypatch):
    monkeypatch.setattr(supervisor, "BALANCER_DEADLINE_SECONDS", 0.1)
    deployment = await deploy(replica_num=1)
    serves = [True, True, True]
    deployment.ranks[0].serves_others = lambda: bool(serves) and serves.pop()
    await deployment.balancer.server.stop(None)
    with pytest.raises(AbandonedError):
        await asyncio.wait_for(deployment.tasks[0], PATIENCE)
    assert not serves


def test_one_of_many_revives_rank_0(echo_config):
    run, _ = submission.prepare(echo_config())
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: run.may_revive(60), range(32))) == 1
    assert run.may_revive(0)
