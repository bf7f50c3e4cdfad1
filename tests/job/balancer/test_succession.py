import asyncio
import subprocess
import time

import pytest

from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import Chain
from mii_hpc.errors import DeploymentStoppingError, SubmissionError, UnavailableError
from mii_hpc.generation import joined
from mii_hpc.job.balancer import lifetime, succession
from mii_hpc.job.balancer.succession import pass_on
from mii_hpc.rpc.wire import Method
from mii_hpc.schedulers import JobState
from mii_hpc.schedulers.local import LocalJob
from mii_hpc.submission import submit as submission
from tests.live import Deployment
from tests.waiting import PATIENCE, until

FOREVER = {"max_new_tokens": 10**6}


class Job:
    """What a deployment's processes know of their own job; its walltime is as the test says."""

    host = ""
    incarnation = 0

    def __init__(self, number, seconds=3600.0):
        self.id, self.at = str(number), time.time() + seconds
        self.preempted = False

    def ends(self):
        return self.at

    def is_preempted(self):
        return self.preempted

    def start_rank(self, *_):
        return True


class First(Deployment):
    """A deployment that is to be served for two hours, in jobs of one."""

    def __init__(self, home, **shape):
        super().__init__(home, **shape)
        self.config = self.config.model_copy(update={"uptime": "2:00:00"})
        self.own_job = Job(self.job.pid)


class Next(Deployment):
    """The job that follows another."""

    def __init__(self, run):
        self.config, self.run = run.load_config(), run
        self.entry = run.read_entry()
        self.keys, self.registry = credentials.load_server(run), Registry(self.config.home)
        self.job = subprocess.Popen(["sh", "-c", "read _", "job", str(run.path)], stdin=subprocess.PIPE)
        self.own_job = Job(self.job.pid)
        self.ranks, self.tasks, self._clients = [], [], []

    async def begin(self):
        self.address = await self.start_balancer()
        self.start_ranks()

    def state(self):
        entry = self.run.read_entry()
        return entry.state if entry else None


@pytest.fixture
def jobs(monkeypatch):
    """The runs that were submitted, and the jobs that were cancelled or told to start now."""

    class Jobs:
        submitted, cancelled, hastened = [], [], []
        problem = ""

    found = Jobs()
    found.submitted, found.cancelled, found.hastened = [], [], []

    def submit(run):
        found.submitted.append(run)
        if found.problem:
            raise SubmissionError(found.problem)
        return str(4710 + len(found.submitted))

    monkeypatch.setattr(succession, "submitted", submit)
    monkeypatch.setattr(succession, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lifetime, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(LocalJob, "cancel", lambda job: found.cancelled.append(job.id))
    monkeypatch.setattr(LocalJob, "hasten", lambda job: found.hastened.append(job.id))
    return found


async def follow(first, jobs):
    """Start the job that was submitted to follow."""
    await until(lambda: first.registry.get("chat").successor)
    following = Next(jobs.submitted[-1])
    await following.begin()
    return following


def job_of_name(deployment):
    entry = deployment.registry.get("chat")
    return entry and entry.run_dir


async def test_the_next_job_takes_the_name_and_no_request_fails(deploy, jobs, held):
    first = await deploy(First, echo_delay=0.005)
    client = first.client()
    stream = client.stream("a", max_new_tokens=100)
    pieces = [await anext(stream)]
    following = await follow(first, jobs)
    owners = set()

    async def ask():
        answers = []
        while following.run.path not in owners or len(answers) < 40:
            owners.add(job_of_name(first))
            answers.append((await client.generate("to be", max_new_tokens=4))[0])
        return answers

    answers = await asyncio.wait_for(ask(), PATIENCE)
    assert owners == {first.run.path, following.run.path}, "the name was never free"
    assert {str(answer) for answer in answers} == {"to be to be "}
    held.set()
    pieces += [piece async for piece in stream]
    (whole,) = joined(pieces)
    assert (str(whole), whole.migrations) == ("a " * 100, 0), "what runs goes on where it is"
    await asyncio.wait_for(first.working, PATIENCE)
    status = await client.status()
    assert (status.state, status.job_id) == ("ready", following.entry.job_id)
    assert status.until == first.run.read_chain().until
    await following.stop()
    assert job_of_name(first) is None


async def test_what_has_not_ended_in_time_goes_on_at_the_next_job(deploy, jobs, held, monkeypatch):
    monkeypatch.setattr(lifetime, "DRAIN_SECONDS", 0.1)
    first = await deploy(First, echo_delay=0.005)
    client = first.client()
    whole = asyncio.create_task(client.generate("a", max_new_tokens=100))
    stream = client.stream("b", max_new_tokens=100)
    pieces = [await anext(stream)]
    following = await follow(first, jobs)
    first.balancer.lifetime._succession._ends = time.time() + succession.LAST_SECONDS
    await asyncio.wait_for(first.working, PATIENCE)
    held.set()
    pieces += [piece async for piece in stream]
    answers = [*joined(pieces), *(await whole)]
    assert [(str(answer), answer.migrations) for answer in answers] == [("b " * 100, 1), ("a " * 100, 1)]
    await following.stop()


async def test_terminating_ends_the_jobs_before_and_after(deploy, jobs):
    first = await deploy(First, echo_delay=0.005)
    client = first.client()
    running = asyncio.create_task(client.generate("a", **FOREVER))
    await until(lambda: not first.is_idle())
    following = await follow(first, jobs)
    await until(lambda: job_of_name(first) == following.run.path)
    following.own_job.at = time.time() + 3600
    await until(lambda: len(jobs.submitted) == 2 and following.registry.get("chat").successor)
    await first.client().terminate_server()
    assert list(dict.fromkeys(jobs.cancelled)) == ["4712", first.own_job.id]
    assert job_of_name(first) is None
    first.ranks[0].leave("SIGTERM")
    with pytest.raises((DeploymentStoppingError, UnavailableError)):
        await running
    await asyncio.wait_for(first.working, PATIENCE)
    await following.stop()


async def test_a_job_whose_predecessor_is_lost_takes_the_name(deploy, jobs, monkeypatch):
    monkeypatch.setattr(succession, "SILENT_SECONDS", 0.0)
    first = await deploy(First)
    following = await follow(first, jobs)
    await first.kill_balancer()
    first.end_job()
    await until(lambda: job_of_name(first) == following.run.path)
    await following.stop()


async def test_callers_wait_for_the_next_job_where_theirs_is_lost(deploy, jobs, held):
    """Also in the moment when that has no job any more, and the next one has not taken the name yet."""
    first = await deploy(First, echo_delay=0.005)
    await until(lambda: first.registry.get("chat").successor)
    running = asyncio.create_task(first.client().generate("a", max_new_tokens=100, ignore_eos=True))
    await until(lambda: not first.is_idle())
    await first.kill_balancer()
    first.end_job()
    entry = first.registry.get("chat")
    first.registry.publish(entry.model_copy(update={"heartbeat": time.time() - 3600}))
    with pytest.raises(UnavailableError, match=r"its job \d+ no longer runs, and job 4711 is to follow"):
        await first.client().generate("b")
    held.set()
    following = Next(jobs.submitted[-1])
    await following.begin()
    (answer,) = await asyncio.wait_for(running, PATIENCE)
    assert (str(answer), answer.migrations) == ("a " * 100, 1)
    await following.stop()


async def test_a_job_whose_predecessor_was_terminated_ends(deploy, jobs):
    first = await deploy(First)
    await until(lambda: first.registry.get("chat").successor)
    following = Next(jobs.submitted[-1])
    await first.client().terminate_server()
    await following.begin()
    await asyncio.wait_for(following.working, PATIENCE)
    assert job_of_name(first) is None
    assert "has ended for good" in following.balancer.ending.reason
    await following.stop()


async def test_a_job_that_ends_before_it_has_the_name_ends_no_other(deploy, jobs):
    first = await deploy(First)
    await until(lambda: first.registry.get("chat").successor)
    following = Next(jobs.submitted[-1])
    await following.start_balancer()
    following.balancer.ending.on_signal("it fails, or somebody ends it")
    await asyncio.wait_for(following.working, PATIENCE)
    assert job_of_name(first) == first.run.path
    assert jobs.cancelled == []
    await following.stop()


async def test_at_the_end_of_the_walltime_the_name_is_that_of_the_job_that_waits(deploy, jobs, held, monkeypatch):
    monkeypatch.setattr(lifetime, "DRAIN_SECONDS", 0.1)
    first = await deploy(First, echo_delay=0.01)
    await until(lambda: first.registry.get("chat").successor)
    client, hasty = first.client(), first.client()
    running = asyncio.create_task(client.generate("a", max_new_tokens=100))
    refused = asyncio.create_task(hasty.generate("a", retry=None, **FOREVER))
    await until(lambda: [stats.running for stats in first.stats()] == [1, 1])
    first.own_job.at = time.time() + 1
    first.balancer.lifetime._succession._ends = first.own_job.at
    with pytest.raises(DeploymentStoppingError, match="its walltime is over") as failure:
        await refused
    assert failure.value.comes_back
    await asyncio.wait_for(first.working, PATIENCE)
    entry = first.registry.get("chat")
    assert (entry.run_dir, entry.state, entry.job_id) == (jobs.submitted[0].path, "pending", "4711")
    assert jobs.hastened == ["4711"]
    held.set()
    following = Next(jobs.submitted[-1])
    await following.begin()
    ((answer,),) = [await asyncio.wait_for(running, PATIENCE)]
    assert (str(answer), answer.migrations) == ("a " * 100, 1)
    await following.stop()


@pytest.mark.parametrize(
    ("left", "preempted", "passes_on"), [(3600, False, False), (3600, True, True), (60, False, True)]
)
async def test_what_a_signal_means(deploy, jobs, left, preempted, passes_on):
    """A preempted job, or one at its walltime, is followed by the next; one that somebody ends is not."""
    first = await deploy(First)
    await until(lambda: first.registry.get("chat").successor)
    first.own_job.preempted = preempted
    first.balancer.lifetime._succession._ends = time.time() + left
    first.ranks[0].leave("SIGTERM")
    await asyncio.wait_for(first.working, PATIENCE)
    assert job_of_name(first) == (jobs.submitted[0].path if passes_on else None)
    # Perhaps twice: once more when the requests have ended, lest another was submitted meanwhile.
    assert (jobs.hastened, set(jobs.cancelled)) == ((["4711"], set()) if passes_on else ([], {"4711"}))


async def test_the_tokens_that_were_rotated_are_those_of_the_next_job(deploy, jobs):
    first = await deploy(First)
    await until(lambda: first.registry.get("chat").successor)
    old = first.run.owner_token.read_text()
    client = first.client()
    await client.rotate_token()
    following = Next(jobs.submitted[-1])
    await until(lambda: following.run.owner_token.read_text() == first.run.owner_token.read_text() != old)
    await following.begin()
    await until(lambda: job_of_name(first) == following.run.path)
    assert not following.balancer.access.admits(Method.STATUS, old)
    assert str((await client.generate("x"))[0]) == "x "
    await following.stop()


async def test_a_job_that_cannot_be_submitted_or_fails_is_told_of_and_tried_again(deploy, jobs, monkeypatch):
    monkeypatch.setattr(succession, "AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(succession, "SCHEDULER_SECONDS", 0.1)
    jobs.problem = "sbatch: error: no"
    first = await deploy(First)
    await until(lambda: "could not be submitted: sbatch: error: no" in first.registry.get("chat").detail)
    jobs.problem = ""
    await until(lambda: first.registry.get("chat").successor)
    last = first.registry.get("chat").successor
    monkeypatch.setattr(LocalJob, "state", lambda job: JobState("gone" if job.id == last else "running"))
    await until(lambda: first.registry.get("chat").successor not in ("", last))


async def test_a_job_that_is_not_ready_in_its_walltime_fails(tmp_path, jobs):
    first = First(tmp_path)
    first.own_job.at = time.time() + 10
    await first.start_balancer()
    await asyncio.wait_for(first.working, PATIENCE)
    assert first.run.read_failure().message.startswith("it was not ready before its walltime was over")
    await first.stop()


async def test_the_uptime_ends_it(deploy, jobs):
    first = await deploy(First)
    first.balancer.lifetime._succession.until = time.time()
    await asyncio.wait_for(first.working, PATIENCE)
    assert (first.balancer.ending.reason, job_of_name(first)) == ("its uptime is over", None)


async def test_a_new_balancer_knows_the_job_that_follows(deploy, jobs):
    first = await deploy(First)
    await until(lambda: first.registry.get("chat").successor)
    await first.kill_balancer()
    await first.replace_balancer()
    await until(lambda: first.state() == "ready")
    assert first.registry.get("chat").successor == "4711"
    assert len(jobs.submitted) == 1


def test_a_run_that_cannot_go_on_leaves_its_name_to_the_next(tmp_path, jobs):
    first = Deployment(tmp_path)
    following = first.run.create_successor(first.config, Chain(time.time() + 3600, first.run.path, "4710"))
    following.write_entry(Entry.of(first.config, following.path, first.entry.fingerprint, "4711"))
    assert pass_on(first.run, first.config)
    assert job_of_name(first) == following.path
    assert jobs.hastened == ["4711"]
    assert not pass_on(first.run, first.config)
    assert job_of_name(first) == following.path
    first.end_job()


def test_a_run_without_a_next_one_frees_its_name(tmp_path):
    alone = Deployment(tmp_path)
    assert not pass_on(alone.run, alone.config)
    assert alone.registry.get("chat") is None
    alone.end_job()


def test_submitting_from_a_job(slurm, echo_config, monkeypatch):
    """The new job gets nothing of the variables of the one around it."""
    config = submission.check(echo_config())
    run, _ = submission.prepare(config)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "7")
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    folder = slurm(sbatch="env > $(dirname $0)/environment; echo Submitted batch job 12")
    assert succession.submitted(run) == "12"
    variables = dict(line.split("=", 1) for line in (folder / "environment").read_text().splitlines() if "=" in line)
    assert variables["SBATCH_ACCOUNT"] == "physics"
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "PMIX_RANK"} & variables.keys()
    slurm(sbatch='echo "sbatch: error: Invalid partition" >&2; exit 1')
    with pytest.raises(SubmissionError, match="Invalid partition"):
        succession.submitted(run)
