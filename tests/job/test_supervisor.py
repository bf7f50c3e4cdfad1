import asyncio

import pytest

from mii_hpc.errors import DeploymentFailedError
from mii_hpc.job import supervisor
from mii_hpc.job.rendezvous import Member, World
from mii_hpc.job.supervisor import keep_balancer
from mii_hpc.placement import role_of
from mii_hpc.submission import submit as submission
from tests.waiting import PATIENCE


class Crashing:
    """A balancer process that ends at once."""

    def __init__(self, log):
        self.log = log

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
