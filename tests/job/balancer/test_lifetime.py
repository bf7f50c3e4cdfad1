import asyncio
import os
import threading

import pytest

from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Registry, heartbeat_is_fresh
from mii_hpc.job.balancer import lifetime
from tests.live import Deployment
from tests.waiting import PATIENCE, until


async def test_the_entry_tells_where_it_is_and_how_it_does(deploy, monkeypatch):
    monkeypatch.setattr(lifetime, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    entry = deployment.registry.get("chat")
    assert (entry.state, entry.address, entry.detail) == ("ready", deployment.address, "2 of 2 replicas ready")
    assert entry.fingerprint == credentials.load_owner(deployment.run).fingerprint
    await until(lambda: deployment.registry.get("chat").heartbeat > entry.heartbeat)


async def test_a_broken_filesystem_does_not_end_the_deployment(deploy, monkeypatch):
    monkeypatch.setattr(lifetime, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    real, failed = Registry.publish, []

    def full(self, entry):
        if len(failed) < 3:
            failed.append(entry)
            raise OSError(28, "No space left on device")
        real(self, entry)

    monkeypatch.setattr(Registry, "publish", full)
    os.utime(deployment.run.progress, (0, 0))
    await until(lambda: len(failed) == 3)
    last = deployment.registry.get("chat").heartbeat
    assert heartbeat_is_fresh(deployment.registry.get("chat").model_copy(update={"heartbeat": 0}))
    await until(lambda: deployment.registry.get("chat").heartbeat > last)


async def test_a_deployment_that_lost_its_name_ends(deploy, monkeypatch):
    monkeypatch.setattr(lifetime, "HEARTBEAT_SECONDS", 0.02)
    deployment = await deploy()
    deployment.registry.withdraw(deployment.entry)
    await asyncio.wait_for(deployment.working, PATIENCE)
    await until(lambda: [rank.left for rank in deployment.ranks] == ["", ""])


async def test_a_slow_write_does_not_come_after_the_withdrawal(deploy, monkeypatch):
    deployment = await deploy()
    real, writing, ended = Registry.publish, threading.Event(), threading.Event()

    def slow(self, entry):
        writing.set()
        ended.wait(0.5)
        real(self, entry)

    monkeypatch.setattr(Registry, "publish", slow)
    deployment.balancer.membership.changed.set()
    await until(writing.is_set)
    deployment.balancer.ending.begin("for the test")
    await deployment.working
    ended.set()
    assert deployment.state() is None


async def test_a_rank_that_is_signalled_ends_the_deployment(deploy):
    deployment = await deploy(tensor_parallel=2)
    deployment.ranks[3].leave("SIGTERM")
    await asyncio.wait_for(deployment.working, PATIENCE)
    assert deployment.state() is None
    await until(lambda: [rank.left for rank in deployment.ranks] == [""] * 4)


class Loading(Deployment):
    """A deployment of which nothing is waited for; its engines never come up."""

    startup_timeout = 1800.0

    async def start(self):
        self.config = self.config.model_copy(update={"startup_timeout": self.startup_timeout})
        self.address = await self.start_balancer()
        self.start_ranks()
        for rank in self.ranks:
            rank.comes_back = False
        return self


async def test_an_engine_that_dies_while_loading_fails_the_deployment(deploy):
    deployment = await deploy(Loading)
    rank = deployment.ranks[1]
    await until(lambda: rank.epochs)
    await until(lambda: rank.engine is not None)
    deployment.run.engine_log(1).write_text("Traceback ...")
    rank.engine.die("RuntimeError: no weights", status=1)
    await asyncio.wait_for(deployment.working, PATIENCE)
    failure = deployment.run.read_failure()
    assert failure.message == "rank 1 (replica 1, host node1): RuntimeError: no weights"
    assert (failure.rank, failure.host, failure.log) == (1, "node1", "Traceback ...")
    await until(lambda: [rank.left for rank in deployment.ranks] == [failure.message] * 2)
    assert deployment.state() is None


class Impatient(Loading):
    startup_timeout = 0.2


async def test_a_deployment_that_does_not_become_ready_fails(deploy):
    deployment = await deploy(Impatient)
    await asyncio.wait_for(deployment.working, PATIENCE)
    assert deployment.run.read_failure().message.startswith("not ready after startup_timeout=0 s: replica 0: ")


async def test_a_heartbeat_that_fails_ends_the_balancer_and_leaves_the_entry(deploy, monkeypatch):
    """Another balancer takes over; a deployment without a heartbeat would lose its name while it serves."""
    deployment = await deploy()

    def broken(_self, _entry):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Registry, "publish", broken)
    deployment.balancer.membership.changed.set()
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(deployment.working, PATIENCE)
    assert deployment.state() == "ready"


async def test_a_requeued_job_leaves_its_entry_pending(deploy):
    deployment = await deploy()
    deployment.balancer.ending.begin("requeued")
    await deployment.working
    assert deployment.state() is None
    again = Deployment(deployment.config.home)
    await again.start_balancer(lambda: True)
    again.balancer.ending.begin("requeued")
    await again.working
    entry = again.registry.get("chat")
    assert (entry.state, entry.address, entry.run_dir) == ("pending", "", again.run.path)
    await again.stop()
