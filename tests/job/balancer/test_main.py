import asyncio
import os
import subprocess
import sys
import time

from mii_hpc.job.net import reserve_port
from mii_hpc.schedulers.local import JOB_ID
from tests.live import Deployment
from tests.waiting import PATIENCE, until


class OwnProcess(Deployment):
    """A deployment whose balancer is the real process."""

    async def start_balancer(self):
        self.reserved = reserve_port("127.0.0.1")
        self.address = f"127.0.0.1:{self.reserved.getsockname()[1]}"
        self.start_process()
        return self.address

    def start_process(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mii_hpc.job.balancer", str(self.run.path), self.address, "0"],
            env={**os.environ, JOB_ID: str(self.job.pid)},
            stderr=subprocess.DEVNULL,
        )

    async def stop_balancer(self):
        self.process.kill()
        self.process.wait(PATIENCE)
        self.reserved.close()


async def test_a_new_balancer_adopts_the_running_engines(deploy):
    deployment = await deploy(OwnProcess, tensor_parallel=2, echo_delay=0.005)
    client = deployment.client()
    await client.generate("before")
    running = asyncio.create_task(client.generate(["a"] * 6, max_new_tokens=1000))
    await until(lambda: [stats.running for stats in deployment.stats()[:2]] == [3, 3])
    heartbeat = deployment.registry.get("chat").heartbeat
    deployment.process.kill()
    deployment.process.wait(PATIENCE)
    await until(deployment.is_idle)
    deployment.start_process()
    assert [(str(answer), answer.migrations) for answer in await running] == [("a " * 1000, 1)] * 6
    await until(lambda: (entry := deployment.registry.get("chat")).heartbeat > heartbeat and entry.state == "ready")
    assert sorted(r.replica for r in await client.generate(["a", "b"])) == [0, 1]
    status = await client.status()
    assert [(replica.state, replica.epoch) for replica in status.replicas] == [("ready", 1), ("ready", 1)]
    assert [rank.epochs for rank in deployment.ranks] == [[1]] * 4
    assert status.started == deployment.registry.get("chat").started < time.time()


async def test_a_run_without_an_entry_takes_its_name_again(tmp_path):
    """As a job does that was requeued after an orderly end."""
    deployment = OwnProcess(tmp_path)
    deployment.registry.withdraw(deployment.entry)
    await deployment.start_balancer()
    await until(lambda: deployment.state() == "loading")
    assert deployment.registry.get("chat").run_dir == deployment.run.path
    await deployment.stop()


async def test_a_run_whose_name_is_another_s_fails(tmp_path):
    deployment = OwnProcess(tmp_path)
    deployment.registry.withdraw(deployment.entry)
    other = OwnProcess(tmp_path)
    await deployment.start_balancer()
    assert await asyncio.to_thread(deployment.process.wait, PATIENCE) == 0
    assert "taken by job (new), which is pending" in deployment.run.read_failure().message
    assert deployment.registry.get("chat").run_dir == other.run.path
    await deployment.stop()
    other.end_job()


async def test_a_new_balancer_knows_what_was_ready(deploy):
    """The death of an engine while another balancer takes over does not end what has served already."""
    deployment = await deploy(OwnProcess)
    started = deployment.registry.get("chat").started
    deployment.process.kill()
    deployment.process.wait()
    rank = deployment.ranks[1]
    rank.comes_back = False
    lost = rank.engine
    lost.die()
    deployment.start_process()
    await until(lambda: deployment.state() == "degraded" and rank.engine not in (None, lost))
    epochs = len(rank.epochs)
    rank.comes_back = True
    rank.engine.die("RuntimeError: again", status=1)
    await until(lambda: deployment.state() == "ready")
    assert len(rank.epochs) > epochs
    assert deployment.registry.get("chat").started == started
