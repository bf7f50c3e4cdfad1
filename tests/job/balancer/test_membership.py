import asyncio
import contextlib

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.errors import InvalidRequestError, RequestError
from mii_hpc.job.balancer import membership
from mii_hpc.job.balancer.membership import Membership
from mii_hpc.job.tasks import Tasks
from mii_hpc.rpc import liveness
from tests.waiting import PATIENCE, until


class Rank:
    """One rank's stream to a membership: what it reports and what it is ordered."""

    def __init__(self, membership, number):
        self.orders = []
        self._membership = membership
        self._reports = asyncio.Queue()
        self._report = {"rank": number, "host": f"node{number}"}
        self._task = None

    def join(self, **report):
        self.report(**report)
        self._task = asyncio.create_task(self._hold())
        return self

    def report(self, **changes):
        self._report.update(changes)
        self._reports.put_nowait(pb.RankReport(**self._report))

    async def _hold(self):
        async with contextlib.aclosing(self._membership.join(self._read())) as orders:
            async for order in orders:
                if order.WhichOneof("order"):  # else it is a sign of life
                    self.orders.append(order)

    async def _read(self):
        while (report := await self._reports.get()) is not None:
            yield report

    def close(self):
        """End its side of the stream, as a rank that leaves does."""
        self._reports.put_nowait(None)

    async def vanish(self):
        """Break the stream, as gRPC shows it when the rank's host dies."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def result(self):
        await self._task

    def kinds(self):
        return [order.WhichOneof("order") for order in self.orders]

    async def ordered(self, kind, times=1):
        await until(lambda: self.kinds().count(kind) >= times)
        return getattr([order for order in self.orders if order.WhichOneof("order") == kind][-1], kind)


class Deployment:
    """A membership of two replicas of two ranks, with a record of what it tells the balancer."""

    def __init__(self):
        self.ready, self.lost, self.deaths, self.leaving = [], [], [], []
        self.first_generation_fails = None
        self.membership = Membership(
            2, 2, self.admit, self.lost.append, self.deaths.append, self.leaving.append, Tasks()
        )
        self.ranks = [Rank(self.membership, number) for number in range(4)]

    async def admit(self, replica, address):
        if self.first_generation_fails:
            raise self.first_generation_fails
        self.ready.append((replica.index, replica.host, address))

    def states(self):
        return [replica.state for replica in self.membership.replicas]

    async def form(self, *replicas, epoch=1):
        """Bring replicas from nothing to ready."""
        for index in replicas:
            leader, follower = self.ranks[2 * index : 2 * index + 2]
            await leader.ordered("start", epoch)
            leader.report(engine=pb.STARTING, epoch=epoch, store_address=f"store{index}:{epoch}")
            await follower.ordered("start", epoch)
            follower.report(engine=pb.READY, epoch=epoch)
            leader.report(engine=pb.READY, address=f"leader{index}:{epoch}")
            await until(lambda index=index: self.states()[index] == "ready")


@pytest.fixture
async def deployment(monkeypatch, request):
    if "silent" not in request.node.name:  # these ranks say only what the tests want
        monkeypatch.setattr(membership.Pulse, "lost", lambda _self: asyncio.Event().wait())
    monkeypatch.setattr(membership, "REFORM_BACKOFF_SECONDS", (0.0,))
    made = Deployment()
    yield made
    for rank in made.ranks:
        if rank._task is not None:
            await rank.vanish()


async def test_the_leader_starts_first_and_the_others_meet_at_its_store(deployment):
    leader, follower = deployment.ranks[0].join(), deployment.ranks[1]
    await until(lambda: 0 in deployment.membership.members)
    assert deployment.states() == ["waiting", "waiting"]
    follower.join()
    assert (await leader.ordered("start")) == pb.StartEngine(epoch=1)
    assert deployment.states() == ["forming", "waiting"]
    assert "start" not in follower.kinds(), "there is no store yet"
    leader.report(engine=pb.STARTING, epoch=1, store_address="node0:99")
    assert (await follower.ordered("start")) == pb.StartEngine(epoch=1, store_address="node0:99")
    assert deployment.states() == ["loading", "waiting"]
    follower.report(engine=pb.STARTING, epoch=1)
    leader.report(engine=pb.READY, address="node0:100")
    follower.report(engine=pb.READY)
    await until(lambda: deployment.states() == ["ready", "waiting"])
    assert deployment.ready == [(0, "node0", "node0:100")]


async def test_progress_is_shown(deployment):
    leader, _ = deployment.ranks[0].join(), deployment.ranks[1].join()
    await leader.ordered("start")
    leader.report(engine=pb.STARTING, epoch=1, detail="layer 3 of 32")
    await until(lambda: deployment.membership.replicas[0].detail == "rank 0: layer 3 of 32")


async def test_an_engine_that_dies_takes_its_replica_out_and_the_replica_comes_back(deployment):
    for rank in deployment.ranks:
        rank.join()
    await deployment.form(0, 1)
    deployment.ranks[3].report(engine=pb.DOWN, detail="was killed by SIGKILL")
    await until(lambda: deployment.lost == [1])
    (death,) = deployment.deaths
    assert (death.replica, death.replica_was_ready, death.report.rank) == (1, True, 3)
    await deployment.ranks[2].ordered("stop_engine")
    deployment.ranks[2].report(engine=pb.DOWN)
    await deployment.form(1, epoch=2)
    assert deployment.states() == ["ready", "ready"]
    assert deployment.ready == [(0, "node0", "leader0:1"), (1, "node2", "leader1:1"), (1, "node2", "leader1:2")]
    assert deployment.ranks[0].kinds() == deployment.ranks[1].kinds()[-1:] == ["start"], "the other one is not touched"


async def test_a_rank_that_is_gone_takes_its_replica_out_until_it_is_back(deployment):
    for rank in deployment.ranks:
        rank.join()
    await deployment.form(0, 1)
    await deployment.ranks[1].vanish()
    await until(lambda: deployment.lost == [0])
    assert deployment.membership.replicas[0].detail == "rank 1 on node1 has left"
    assert deployment.deaths == []
    await deployment.ranks[0].ordered("stop_engine")
    deployment.ranks[0].report(engine=pb.DOWN)
    assert deployment.states() == ["waiting", "ready"]
    deployment.ranks[1].join()
    await deployment.form(0, epoch=2)


async def test_an_old_engine_s_death_does_not_break_the_new_one(deployment):
    for rank in deployment.ranks:
        rank.join()
    await deployment.form(0)
    deployment.ranks[0].report(engine=pb.DOWN, detail="died")
    await deployment.ranks[0].ordered("start", 2)
    deployment.ranks[1].report(engine=pb.DOWN, epoch=1, detail="died of the other's death")
    deployment.ranks[0].report(engine=pb.STARTING, epoch=2, store_address="store")
    assert (await deployment.ranks[1].ordered("start", 2)).epoch == 2
    assert len(deployment.deaths) == 1


@pytest.mark.parametrize("kind", [RequestError, ValueError])
async def test_a_first_generation_that_fails_is_a_death(deployment, kind):
    deployment.first_generation_fails = kind("out of memory")
    leader, follower = deployment.ranks[0].join(), deployment.ranks[1].join()
    await leader.ordered("start")
    leader.report(engine=pb.STARTING, epoch=1, store_address="store")
    await follower.ordered("start")
    follower.report(engine=pb.READY, epoch=1)
    leader.report(engine=pb.READY, address="here")
    await until(lambda: deployment.deaths)
    assert deployment.deaths[0].report.detail == "its first generation failed: out of memory"
    assert not deployment.deaths[0].replica_was_ready
    await follower.ordered("stop_engine")


async def test_engines_that_run_together_are_adopted(deployment):
    deployment.ranks[0].join(engine=pb.READY, epoch=5, address="there:1")
    deployment.ranks[1].join(engine=pb.READY, epoch=5)
    await until(lambda: deployment.states()[0] == "ready")
    assert deployment.ready == [(0, "node0", "there:1")]
    assert deployment.membership.replicas[0].epoch == 5
    assert deployment.ranks[0].orders == deployment.ranks[1].orders == []


@pytest.mark.parametrize(
    "other", [{"engine": pb.READY, "epoch": 4}, {"engine": pb.STARTING, "epoch": 5}, {"engine": pb.DOWN}]
)
async def test_engines_that_do_not_belong_together_are_replaced(deployment, other):
    deployment.ranks[0].join(engine=pb.READY, epoch=5, address="there:1")
    deployment.ranks[1].join(**other)
    assert (await deployment.ranks[0].ordered("start")).epoch == 6


async def test_a_newer_stream_of_a_rank_replaces_the_older(deployment):
    old, other = deployment.ranks[0].join(), deployment.ranks[1].join()
    await old.ordered("start")
    old.report(engine=pb.STARTING, epoch=1, store_address="store")
    await other.ordered("start")
    new = deployment.ranks[0] = Rank(deployment.membership, 0)
    new.join(engine=pb.STARTING, epoch=1, store_address="store")
    await until(lambda: len(deployment.membership.members) == 2 and deployment.membership.members[0].report.epoch == 1)
    await old.vanish()
    assert deployment.states()[0] == "loading", "the older stream's end means nothing"
    assert set(deployment.membership.members) == {0, 1}


async def test_an_unknown_rank_is_refused(deployment):
    for number in (-1, 4):
        with pytest.raises(InvalidRequestError, match=f"rank {number}: no such rank"):
            await Rank(deployment.membership, number).join().result()
    assert deployment.membership.members == {}


async def test_a_rank_that_is_signalled_is_told_of(deployment):
    deployment.ranks[2].join().report(leaving=True)
    await until(lambda: deployment.leaving)
    assert deployment.leaving[0] == "rank 2 on node2 was told to end by a signal"


async def test_dismissal_waits_until_all_are_gone(deployment):
    for rank in deployment.ranks[:3]:
        rank.join()
    await deployment.form(0)
    dismissing = asyncio.create_task(deployment.membership.end("no memory", PATIENCE))
    for rank in deployment.ranks[:3]:
        assert (await rank.ordered("leave")).failure == "no memory"
    deployment.ranks[0].close()
    deployment.ranks[1].close()
    await deployment.ranks[1].result()
    assert not dismissing.done()
    deployment.ranks[3].join()
    await deployment.ranks[3].ordered("leave")
    assert deployment.ranks[3].kinds() == ["leave"], "who comes late leaves at once"
    deployment.ranks[2].close()
    deployment.ranks[3].close()
    await asyncio.wait_for(dismissing, PATIENCE)
    assert "stop_engine" not in deployment.ranks[0].kinds()


async def test_dismissal_has_a_deadline(deployment):
    deployment.ranks[0].join()
    await until(lambda: deployment.membership.members)
    await asyncio.wait_for(deployment.membership.end("", 0.05), PATIENCE)
    assert 0 in deployment.membership.members


async def test_a_replica_that_loads_for_too_long_is_formed_again(deployment):
    leader, _ = deployment.ranks[0].join(), deployment.ranks[1].join()
    await leader.ordered("start")
    deployment.membership.expire(60)
    assert deployment.states()[0] == "forming"
    deployment.membership.expire(-1)
    assert (await leader.ordered("start", 2)).epoch == 2


async def test_a_broken_connection_counts_once(deployment):
    for rank in deployment.ranks:
        rank.join()
    await deployment.form(0, 1)
    deployment.membership.lose(1, 1, "its connection broke")
    deployment.membership.lose(1, 1, "its connection broke")
    assert deployment.lost == [1]
    for rank in deployment.ranks[2:]:
        await rank.ordered("stop_engine")
        rank.report(engine=pb.DOWN)
    await deployment.form(1, epoch=2)
    deployment.membership.lose(1, 1, "a late word about the old one")
    assert deployment.lost == [1]


async def test_waits_between_attempts_grow_and_start_anew_after_success(deployment, monkeypatch):
    monkeypatch.setattr(membership, "REFORM_BACKOFF_SECONDS", (0.0, 1.0, 2.0))
    slept, real = [], asyncio.sleep

    async def sleep(seconds):
        if seconds >= 1 or seconds == 0.0:
            slept.append(seconds)
        await real(0 if seconds >= 1 else seconds)

    monkeypatch.setattr(membership.asyncio, "sleep", sleep)
    leader, _ = deployment.ranks[0].join(), deployment.ranks[1].join()
    for epoch in (1, 2, 3, 4):
        await leader.ordered("start", epoch)
        leader.report(engine=pb.STARTING, epoch=epoch, store_address="store")
        leader.report(engine=pb.DOWN, detail="died")
    await leader.ordered("start", 5)
    assert slept == [0.0, 1.0, 2.0, 2.0, 2.0]
    await deployment.form(0, epoch=5)
    assert deployment.membership.replicas[0].failures == 0


async def test_a_silent_rank_is_lost_and_told_of(deployment, monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.2)
    lost = []
    deployment.membership._on_lost = lambda *rank: lost.append(rank)
    silent, talking = deployment.ranks[0].join(), deployment.ranks[2].join()
    await until(lambda: len(deployment.membership.members) == 2)
    while not lost:
        talking.report()
        await asyncio.sleep(0.01)
    await asyncio.wait_for(silent.result(), PATIENCE)
    assert lost == [(0, "node0")]
    assert set(deployment.membership.members) == {2}
    assert deployment.membership.replicas[0].detail == "rank 0 on node0 gives no sign of life for 0 s"
