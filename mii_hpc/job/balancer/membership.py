"""The ranks that have joined, and the replicas that they form."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.errors import InvalidRequestError
from mii_hpc.job.tasks import Tasks
from mii_hpc.placement import role_of
from mii_hpc.rpc import liveness
from mii_hpc.rpc.liveness import Pulse

log = logging.getLogger(__name__)

REFORM_BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Waits before a replica that keeps failing is formed again; the last one repeats."""


State = Literal["waiting", "forming", "loading", "ready"]


@dataclass
class Member:
    """One rank that has joined: its latest report, and the orders that it has not been sent yet."""

    report: pb.RankReport
    orders: asyncio.Queue[pb.RankOrder] = field(default_factory=asyncio.Queue)
    pulse: Pulse = field(default_factory=Pulse)


@dataclass
class Replica:
    """One replica, as the balancer sees it.

    waiting: not all of its ranks have joined. forming: its leader's engine process starts and opens the store.
    loading: all its engine processes run. ready: a generation has passed through it, and it takes requests.
    """

    index: int
    ranks: range
    state: State = "waiting"
    epoch: int = 0
    detail: str = "its ranks have not joined yet"
    host: str = ""
    was_ready: bool = False
    failures: int = 0
    since: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] | None = None
    """What runs between two states: the wait before forming, or the first generation."""


@dataclass(frozen=True)
class EngineDeath:
    """An engine process that ended without an order, as its rank reports it."""

    report: pb.RankReport
    replica: int
    replica_was_ready: bool


class Membership:
    """Forms the replicas of a deployment from the ranks that join, and re-forms those that break.

    Belongs to one event loop. `admit` is given a replica that has loaded, and its leader's address; it lets the
    replica take requests once a generation has passed through it, or raises a MIIError. `dismiss` is given the index
    of a replica the moment it can take no more. `on_death` is called when an engine died, `on_leaving` with a reason
    when a rank was told to end by a signal.

    `changed` is set whenever a replica's state changes.
    """

    def __init__(
        self,
        tensor_parallel: int,
        replica_num: int,
        admit: Callable[[Replica, str], Awaitable[None]],
        dismiss: Callable[[int], None],
        on_death: Callable[[EngineDeath], None],
        on_leaving: Callable[[str], None],
        tasks: Tasks,
        ready: Collection[int] = (),
        on_lost: Callable[[int, str], None] = lambda rank, host: None,
    ) -> None:
        self.replicas = [
            Replica(index, role_of(index * tensor_parallel, tensor_parallel).replica_ranks, was_ready=index in ready)
            for index in range(replica_num)
        ]
        self._tensor_parallel = tensor_parallel
        self.changed = asyncio.Event()
        self._admit, self._dismiss = admit, dismiss
        self._on_death, self._on_leaving = on_death, on_leaving
        self._tasks = tasks
        self._on_lost = on_lost
        self._members: dict[int, Member] = {}
        self._leave: pb.RankOrder | None = None
        self._all_left = asyncio.Event()

    @property
    def members(self) -> Mapping[int, Member]:
        """The ranks that have joined, by number."""
        return self._members

    @property
    def are_ready(self) -> bool:
        """Whether every replica takes requests."""
        return all(replica.state == "ready" for replica in self.replicas)

    @property
    def has_been_ready(self) -> bool:
        """Whether every replica has been ready at least once."""
        return all(replica.was_ready for replica in self.replicas)

    async def join(self, reports: AsyncIterator[pb.RankReport]) -> AsyncGenerator[pb.RankOrder]:
        """Serve one rank's stream: take its reports, yield its orders. The rank is a member while this runs.

        Raises InvalidRequestError when the job has no such rank.
        """
        first = await anext(reports, None)
        if first is None:
            raise InvalidRequestError("the call has ended without a report")
        if not 0 <= first.rank < len(self.replicas) * self._tensor_parallel:
            raise InvalidRequestError(f"rank {first.rank}: no such rank")
        member = Member(first)
        self._members[first.rank] = member  # a newer stream of a rank replaces an older one
        self._all_left.clear()
        log.info("rank %d on %s has joined", first.rank, first.host)
        if self._leave is not None:
            member.orders.put_nowait(self._leave)
        reading = asyncio.create_task(self._read(member, reports))
        silence = asyncio.create_task(member.pulse.lost())
        left = "has left"
        try:
            self._on_report(member)
            async for order in self._orders(member, {reading, silence}):
                yield order
                if order.WhichOneof("order") == "leave":
                    # Until the rank closes its side, which it does last.
                    await asyncio.wait({reading, silence}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            else:
                left = f"gives no sign of life for {liveness.SILENT_SECONDS:.0f} s"
        finally:
            reading.cancel()
            silence.cancel()
            if self._members.get(first.rank) is member:
                del self._members[first.rank]
                log.info("rank %d on %s %s", first.rank, first.host, left)
                self._break(self._replica_of(first.rank), f"rank {first.rank} on {first.host} {left}")
                if self._leave is None:
                    self._on_lost(first.rank, first.host)
            if not self._members:
                self._all_left.set()

    async def end(self, failure: str, deadline: float) -> None:
        """Order every rank, also a later one, to leave; return when all have left or after `deadline` seconds."""
        self._leave = pb.RankOrder(leave=pb.Leave(failure=failure))
        for member in self._members.values():
            member.orders.put_nowait(self._leave)
        if self._members:
            try:
                await asyncio.wait_for(self._all_left.wait(), deadline)
            except TimeoutError:
                log.warning("ranks %s have not left in time", sorted(self._members))

    def lose(self, index: int, epoch: int, reason: str) -> None:
        """Take a replica out whose connection broke, unless that was noticed already, and form it again."""
        replica = self.replicas[index]
        if replica.epoch == epoch and replica.state == "ready":
            self._break(replica, reason)
            self._advance(replica)

    def give_up(self, rank: int, reason: str) -> None:
        """Note why a rank does not come back."""
        self._replica_of(rank).detail = reason
        self.changed.set()

    def expire(self, deadline: float) -> None:
        """Break the replicas that have been forming or loading for more than `deadline` seconds."""
        for replica in self.replicas:
            if replica.state in ("forming", "loading") and time.monotonic() > replica.since + deadline:
                self._break(replica, f"not ready after {deadline:.0f} s")
                self._advance(replica)

    async def _orders(self, member: Member, ends: set[asyncio.Task[None]]) -> AsyncGenerator[pb.RankOrder]:
        """Yield a rank's orders, and one without content as a sign of life, until one of the tasks has ended."""
        while not any(end.done() for end in ends):
            getting = asyncio.create_task(member.orders.get())
            try:
                await asyncio.wait({getting, *ends}, timeout=liveness.BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                getting.cancel()  # nothing is lost: an order that has arrived is the task's result already
            yield getting.result() if getting.done() else pb.RankOrder()

    async def _read(self, member: Member, reports: AsyncIterator[pb.RankReport]) -> None:
        async for report in reports:
            member.pulse.beat()
            if report == member.report:
                continue
            member.report = report
            if self._members.get(report.rank) is member:
                self._on_report(member)

    def _replica_of(self, rank: int) -> Replica:
        return self.replicas[rank // self._tensor_parallel]

    def _on_report(self, member: Member) -> None:
        report = member.report
        replica = self._replica_of(report.rank)
        if report.leaving:
            self._on_leaving(f"rank {report.rank} on {report.host} was told to end by a signal")
        if self._leave is not None:
            return
        if report.engine == pb.DOWN and report.epoch == replica.epoch and replica.state != "waiting":
            self._on_death(EngineDeath(report, replica.index, replica.was_ready))
            self._break(replica, f"rank {report.rank} on {report.host}: {report.detail}")
        elif report.detail and replica.state in ("forming", "loading"):
            replica.detail = f"rank {report.rank}: {report.detail}"
        self._advance(replica)

    def _advance(self, replica: Replica) -> None:
        """Take the next step towards a ready replica, if its ranks' reports allow one."""
        if self._leave is not None or any(rank not in self._members for rank in replica.ranks):
            return
        members = [self._members[rank] for rank in replica.ranks]
        leader = members[0].report
        current = [member.report for member in members if member.report.epoch == replica.epoch]
        complete = len(current) == len(members)
        if replica.state == "waiting":
            if self._adopt(replica):
                self._advance(replica)
            elif replica.task is None:
                replica.task = self._tasks.start(self._form(replica))
        elif replica.state == "forming" and leader.epoch == replica.epoch and leader.engine != pb.DOWN:
            self._enter(replica, "loading")
            start = pb.StartEngine(epoch=replica.epoch, store_address=leader.store_address)
            for member in members[1:]:
                member.orders.put_nowait(pb.RankOrder(start=start))
        elif (
            replica.state == "loading"
            and complete
            and all(report.engine == pb.READY for report in current)
            and replica.task is None
        ):
            replica.task = self._tasks.start(self._try(replica, leader.address))

    def _adopt(self, replica: Replica) -> bool:
        """Take over engines that already run together: this balancer was started in place of one that died."""
        reports = [self._members[rank].report for rank in replica.ranks]
        epoch = reports[0].epoch
        if epoch <= replica.epoch or any(r.epoch != epoch or r.engine != pb.READY for r in reports):
            return False
        replica.epoch, replica.host = epoch, reports[0].host
        self._enter(replica, "loading")
        return True

    async def _form(self, replica: Replica) -> None:
        wait = REFORM_BACKOFF_SECONDS[min(replica.failures, len(REFORM_BACKOFF_SECONDS) - 1)]
        await asyncio.sleep(wait)
        replica.task = None
        if any(rank not in self._members for rank in replica.ranks) or self._leave is not None:
            return
        members = [self._members[rank] for rank in replica.ranks]
        replica.epoch = max(replica.epoch, *(member.report.epoch for member in members)) + 1
        replica.host = members[0].report.host
        self._enter(replica, "forming")
        for member in members[1:]:
            member.orders.put_nowait(pb.RankOrder(stop_engine=pb.StopEngine()))
        members[0].orders.put_nowait(pb.RankOrder(start=pb.StartEngine(epoch=replica.epoch)))
        log.info("replica %d: forming, epoch %d", replica.index, replica.epoch)

    async def _try(self, replica: Replica, address: str) -> None:
        began = time.monotonic()
        try:
            await self._admit(replica, address)
        except Exception as error:  # noqa: BLE001 (whatever it is, the replica is formed anew)
            replica.task = None
            leader = pb.RankReport()
            leader.CopyFrom(self._members[replica.ranks[0]].report)
            leader.detail = f"its first generation failed: {error}"
            self._on_death(EngineDeath(leader, replica.index, replica.was_ready))
            self._break(replica, leader.detail)
            self._advance(replica)
            return
        replica.task = None
        self._enter(replica, "ready")
        replica.detail = ""
        replica.was_ready, replica.failures = True, 0
        log.info("replica %d is ready; its first generation took %.1f s", replica.index, time.monotonic() - began)

    def _enter(self, replica: Replica, state: State) -> None:
        replica.state, replica.since = state, time.monotonic()
        self.changed.set()

    def _break(self, replica: Replica, reason: str) -> None:
        """Take a replica out at once, and stop what still runs of it: its engines cannot go on without each other."""
        if replica.task is not None:
            replica.task.cancel()
            replica.task = None
        if replica.state == "ready":
            self._dismiss(replica.index)
        if replica.state != "waiting":
            replica.failures += 1
            for rank in replica.ranks:
                member = self._members.get(rank)
                if member is not None and member.report.engine != pb.DOWN and self._leave is None:
                    member.orders.put_nowait(pb.RankOrder(stop_engine=pb.StopEngine()))
        self._enter(replica, "waiting")
        replica.detail = reason
        if self._leave is None:
            log.warning("replica %d is out: %s", replica.index, reason)
