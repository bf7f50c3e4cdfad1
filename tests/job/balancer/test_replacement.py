import asyncio

import pytest

from mii_hpc.job.balancer import replacement
from mii_hpc.job.balancer.replacement import Replacements
from mii_hpc.job.tasks import Tasks
from tests.waiting import PATIENCE, until


class Job:
    """What a replacement sees of a deployment."""

    def __init__(self):
        self.members, self.has_begun, self.started = {}, False, []
        self.given_up = []
        self.has_node = True

    def start(self, rank, node):
        self.started.append((rank, node))
        return self.has_node

    def give_up(self, rank, reason):
        self.given_up.append((rank, reason))


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(replacement, "REPLACE_SECONDS", (0.05, 0.01))
    return Job()


async def test_a_rank_that_is_lost_is_started_until_it_is_back(job):
    tasks = Tasks()
    replacements = Replacements(job, job, tasks, job.start)
    replacements.lose(3, "n2")
    replacements.lose(3, "n2")
    await until(lambda: len(job.started) >= 3)
    assert set(job.started) == {(3, "n2")}
    job.members[3] = "back"
    await until(lambda: not replacements._missing)
    count = len(job.started)
    replacements.lose(3, "n2")
    await until(lambda: not replacements._missing)
    assert len(job.started) == count, "it came back by itself"


async def test_nothing_is_started_when_the_deployment_ends(job):
    replacements = Replacements(job, job, Tasks(), job.start)
    job.has_begun = True
    replacements.lose(0, "n1")
    await asyncio.wait_for(until(lambda: not replacements._missing), PATIENCE)
    assert not job.started


async def test_a_rank_whose_node_the_job_has_lost_is_given_up(job):
    replacements = Replacements(job, job, Tasks(), job.start)
    job.has_node = False
    replacements.lose(3, "n2")
    await until(lambda: job.given_up)
    assert (job.started, job.given_up) == ([(3, "n2")], [(3, "the job has lost node n2, and rank 3 with it")])
