"""The balancer process, on rank 0: one address for all replicas.

Request i goes to replica i mod n of the n live ones, and its bytes pass through unread. The membership of the
replicas decides which are live. The balancer also keeps the registry entry and ends the deployment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import GenerateParamsConfig, MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.registry import HEARTBEAT_SECONDS, Entry, Registry
from mii_hpc.deployments.rundir import Failure, RunDir, write_atomically
from mii_hpc.deployments.sharing import Share
from mii_hpc.errors import (
    DeploymentError,
    DeploymentStoppingError,
    MIIError,
    RegistryError,
    ReplicaLostError,
    RequestTimeoutError,
    UnavailableError,
)
from mii_hpc.generation import GenerationRequest
from mii_hpc.heap import give_memory_back
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.membership import EngineDeath, Membership
from mii_hpc.job.process import end_with_rank
from mii_hpc.rpc import transport, wire
from mii_hpc.submission.submit import SlurmJob, free_name

log = logging.getLogger(__name__)

DRAIN_SECONDS = 3.0
"""What a request that runs may still take when the deployment ends."""
DISMISS_SECONDS = 8.0
LISTS_REMEMBERED = 4096
"""Calls with several prompts whose turns are kept in mind."""
LOAD_SECONDS = 2.0
"""A replica's load is left out of the status when the replica does not tell it within this time."""
TRIAL_SECONDS = 120.0
"""A replica's first generation may take this long; it warms up what is compiled on first use."""


GUESTS_METHODS = frozenset({wire.GENERATE.path, wire.STATUS.path})
OWNERS_METHODS = GUESTS_METHODS | {wire.TERMINATE.path, wire.ROTATE_TOKEN.path}


@dataclass
class LiveReplica:
    """A replica that takes requests."""

    index: int
    epoch: int
    host: str
    channel: grpc.aio.Channel
    in_flight: set[grpc.aio.UnaryStreamCall] = field(default_factory=set)


class Router:
    """Strict round robin over the live replicas. Belongs to one event loop, where no two requests interleave."""

    def __init__(self) -> None:
        self._live: dict[int, LiveReplica] = {}
        self._count = 0
        self._lists: dict[str, int] = {}
        """For each of the latest calls with several prompts: the turn of its first one."""
        self.served: dict[int, int] = {}

    def add(self, replica: LiveReplica) -> None:
        """Let a replica take requests from now on."""
        self._live[replica.index] = replica

    def remove(self, index: int) -> LiveReplica | None:
        """Let a replica take no more requests, and return it; None when it took none before."""
        return self._live.pop(index, None)

    def next(self, place: wire.Place | None = None) -> LiveReplica:
        """Return the replica for the next request, or for the one at that place of a list.

        The prompts of a list take consecutive turns, in whatever order they arrive. Raises UnavailableError when no
        replica is live.
        """
        if not self._live:
            raise UnavailableError("no replica of the deployment is able to serve at the moment")
        order = sorted(self._live)
        chosen = self._live[order[self._turn(place) % len(order)]]
        self.served[chosen.index] = self.served.get(chosen.index, 0) + 1
        return chosen

    def _turn(self, place: wire.Place | None) -> int:
        if place is not None and place.call in self._lists:
            return self._lists[place.call] + place.index
        first = self._count
        self._count += 1 if place is None else place.count
        if place is None:
            return first
        self._lists[place.call] = first
        if len(self._lists) > LISTS_REMEMBERED:
            del self._lists[next(iter(self._lists))]
        return first + place.index

    def in_flight(self, index: int) -> int:
        """Return how many requests a replica works on."""
        return len(self._live[index].in_flight) if index in self._live else 0

    @property
    def live(self) -> list[LiveReplica]:
        """The live replicas, by index."""
        return [self._live[index] for index in sorted(self._live)]


class Doors:
    """Which token opens which method of the balancer."""

    def __init__(self, run: RunDir, config: MIIConfig) -> None:
        self._run = run
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._rank = credentials.read_token(run.rank_token)
        self._owner = credentials.read_token(run.owner_token)
        self._guest = credentials.read_token(run.guest_token)

    def admits(self, method: str, token: str) -> bool:
        """Whether a token opens a method. Takes the same time whatever the answer."""
        rank, owner, guest = (transport.same_token(token, own) for own in (self._rank, self._owner, self._guest))
        return (
            (rank and method == wire.ATTEND.path)
            or (owner and method in OWNERS_METHODS)
            or (guest and bool(self._share) and method in GUESTS_METHODS)
        )

    def change_locks(self) -> None:
        """Make new tokens for the owner and the guests; calls that were admitted already go on."""
        self._owner, self._guest = credentials.new_token(), credentials.new_token()
        write_atomically(self._run.owner_token, self._owner)
        write_atomically(self._run.guest_token, self._guest)
        if self._share:
            self._share.write_token(self._guest)


class Balancer:
    """The balancer of one deployment. Belongs to one event loop."""

    def __init__(self, run: RunDir, config: MIIConfig, keys: credentials.ClientCredentials) -> None:
        model = config.model_conf
        self._run, self._config, self._keys = run, config, keys
        self._registry = Registry(config.home)
        self._share = config.shared_group and Share(config.home, config.deployment_name, config.shared_group)
        self._doors = Doors(run, config)
        self.router = Router()
        self._authorization = transport.authorization(keys)
        self.membership = Membership(
            model.tensor_parallel,
            model.replica_num,
            on_ready=self._try_replica,
            on_lost=self._lose_replica,
            on_death=self._on_death,
            on_leaving=self.stop,
        )
        self._entry: Entry | None = None
        self._was_ready = self._ended = False
        self._stopping = asyncio.Event()
        self._reason = self._failure = ""
        self._dirty = asyncio.Event()
        self._started = time.monotonic()

    def admits(self, method: str, token: str) -> bool:
        """Whether a token opens a method."""
        return self._doors.admits(method, token)

    def services(self) -> dict[str, dict[str, grpc.RpcMethodHandler]]:
        """Return the handlers of everything that the balancer answers."""
        # No (de)serialisers: bytes in, bytes out. A handler of request streams runs as soon as a call arrives, so
        # requests take their turns in the order of the client's calls, however long their messages are.
        passing = grpc.stream_stream_rpc_method_handler(self.generate)
        return {
            wire.GENERATE.service: {wire.GENERATE.name: passing},
            wire.STATUS.service: {
                wire.STATUS.name: grpc.unary_unary_rpc_method_handler(
                    self.status,
                    request_deserializer=pb.StatusRequest.FromString,
                    response_serializer=pb.StatusResponse.SerializeToString,
                ),
                wire.TERMINATE.name: grpc.unary_unary_rpc_method_handler(
                    self.terminate,
                    request_deserializer=pb.TerminateRequest.FromString,
                    response_serializer=pb.TerminateResponse.SerializeToString,
                ),
                wire.ROTATE_TOKEN.name: grpc.unary_unary_rpc_method_handler(
                    self.rotate_token,
                    request_deserializer=pb.RotateTokenRequest.FromString,
                    response_serializer=pb.RotateTokenResponse.SerializeToString,
                ),
            },
            wire.ATTEND.service: {
                wire.ATTEND.name: grpc.stream_stream_rpc_method_handler(
                    self.membership.attend,
                    request_deserializer=pb.RankReport.FromString,
                    response_serializer=pb.RankOrder.SerializeToString,
                )
            },
        }

    async def generate(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Pass one request to the next replica and its answer back."""
        try:
            if self._stopping.is_set():
                raise DeploymentStoppingError(self._says(f"is ending ({self._reason})"))
            replica = self.router.next(_place(context))
        except MIIError as error:
            await wire.abort(context, error)
        payload = await anext(requests)
        try:
            call = replica.channel.unary_stream(wire.GENERATE.path)(
                payload, timeout=context.time_remaining(), metadata=self._authorization
            )
        except grpc.aio.UsageError:  # lost, and its channel closed, since it was chosen
            await wire.abort(context, self._interrupted(replica))
        replica.in_flight.add(call)
        try:
            await context.send_initial_metadata(((wire.REPLICA_KEY, str(replica.index)),))
            async for chunk in call:
                yield chunk
        except grpc.aio.AioRpcError as failure:
            if wire.own_error_name(failure) is not None:
                await context.abort(failure.code(), failure.details(), tuple(failure.trailing_metadata()))
            await wire.abort(context, self._translate(failure, replica))
        except asyncio.CancelledError:
            # Cancelled by us, because the replica is lost or the time to drain is over; or by the client.
            if transport.is_being_cancelled():
                raise
            await wire.abort(context, self._interrupted(replica))
        finally:
            replica.in_flight.discard(call)
            call.cancel()

    async def status(self, _request: pb.StatusRequest, _context: grpc.aio.ServicerContext) -> pb.StatusResponse:
        """Return the state of the deployment and its replicas."""
        live = self.router.live
        loads = dict(zip((r.index for r in live), await asyncio.gather(*map(self._load_of, live)), strict=True))
        return pb.StatusResponse(
            deployment_name=self._config.deployment_name,
            state=self._state(),
            job_id=self._entry.job_id if self._entry else "",
            replicas=[
                pb.ReplicaStatus(
                    index=replica.index,
                    state=replica.state,
                    host=replica.host,
                    epoch=replica.epoch,
                    in_flight=self.router.in_flight(replica.index),
                    served=self.router.served.get(replica.index, 0),
                    detail=replica.detail,
                    load=loads.get(replica.index),
                )
                for replica in self.membership.replicas
            ],
        )

    async def _load_of(self, replica: LiveReplica) -> pb.LoadResponse | None:
        call = replica.channel.unary_unary(
            wire.LOAD.path,
            request_serializer=pb.LoadRequest.SerializeToString,
            response_deserializer=pb.LoadResponse.FromString,
        )
        try:
            return await call(pb.LoadRequest(), timeout=LOAD_SECONDS, metadata=self._authorization)  # type: ignore[no-any-return]
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            return None
        except asyncio.CancelledError:
            if transport.is_being_cancelled():
                raise
            return None  # the replica was lost meanwhile

    async def terminate(
        self, _request: pb.TerminateRequest, _context: grpc.aio.ServicerContext
    ) -> pb.TerminateResponse:
        """Begin to end the deployment."""
        self.stop("a client asked for it")
        return pb.TerminateResponse()

    async def rotate_token(
        self, _request: pb.RotateTokenRequest, _context: grpc.aio.ServicerContext
    ) -> pb.RotateTokenResponse:
        """Make the clients' tokens invalid, and write new ones to their files."""
        self._doors.change_locks()
        log.info("the clients' tokens were replaced")
        return pb.RotateTokenResponse()

    def stop(self, reason: str) -> None:
        """Begin to end the deployment: from now on no request is admitted. The first reason counts."""
        if not self._stopping.is_set():
            log.info("the deployment ends: %s", reason)
            self._reason = reason
            self._stopping.set()
            self._dirty.set()

    async def work(self, entry: Entry) -> None:
        """Keep the deployment and its registry entry until it ends; tell the ranks why it did."""
        self._entry = entry
        keeping = asyncio.create_task(self._keep_entry())
        watching = asyncio.create_task(self._watch_deadlines())
        try:
            await self._stopping.wait()
            await self._drain()
            await self.membership.dismiss(self._failure, DISMISS_SECONDS)
        finally:
            watching.cancel()
            # Not cancelled: a write that is under way on its thread must not come after the withdrawal.
            self._ended = True
            self._dirty.set()
            await asyncio.gather(keeping, watching, return_exceptions=True)
            for replica in self.router.live:
                await replica.channel.close()
            free_name(self._entry, self._config)

    async def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while any(replica.in_flight for replica in self.router.live) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for replica in self.router.live:
            for call in list(replica.in_flight):
                call.cancel()

    async def _try_replica(self, index: int, address: str) -> None:
        """Send one small request through a replica; if it answers, let it take requests."""
        replica = self.membership.replicas[index]
        channel = transport.open_channel(address, self._keys)
        params = GenerateParamsConfig(max_new_tokens=2, do_sample=False, ignore_eos=True)
        request = wire.pack_request(GenerationRequest("trial", "Hello", params))
        try:
            call = channel.unary_stream(wire.GENERATE.path)(
                request.SerializeToString(),
                timeout=TRIAL_SECONDS,
                metadata=self._authorization,
                wait_for_ready=True,
            )
            async for _ in call:
                pass
        except grpc.aio.AioRpcError as failure:
            await channel.close()
            raise wire.error_of(failure) from failure
        self.router.add(LiveReplica(index, replica.epoch, replica.host, channel))
        asyncio.get_running_loop().call_soon(self._note_readiness)

    def _note_readiness(self) -> None:
        self._was_ready = self._was_ready or all(r.state == "ready" for r in self.membership.replicas)
        self._dirty.set()

    def _lose_replica(self, index: int) -> None:
        replica = self.router.remove(index)
        self._dirty.set()
        if replica is not None:
            for call in list(replica.in_flight):
                call.cancel()
            asyncio.ensure_future(replica.channel.close())  # noqa: RUF006 (nothing waits for it)

    def _on_death(self, death: EngineDeath) -> None:
        """What fails before its replica was ever ready will fail again: the deployment fails, at once."""
        self._dirty.set()
        report = death.report
        message = f"rank {report.rank} (replica {death.replica}, host {report.host}): {report.detail}"
        log.error("%s", message)
        if not death.replica_was_ready:
            self._fail(Failure(report.rank, report.host, message, report.log))

    def _fail(self, failure: Failure) -> None:
        if not self._stopping.is_set():
            self._failure = failure.message
            self._run.write_failure(failure)
            self.stop(failure.message)

    def _translate(self, failure: grpc.aio.AioRpcError, replica: LiveReplica) -> MIIError:
        if failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RequestTimeoutError("the caller's timeout passed before the answer was complete")
        # The connection broke before the rank's supervisor could say that its engine is gone.
        self.membership.lose(replica.index, replica.epoch, "its connection broke")
        return self._interrupted(replica)

    def _interrupted(self, replica: LiveReplica) -> MIIError:
        if self._stopping.is_set():
            return DeploymentStoppingError(self._says(f"has ended ({self._reason})"))
        return ReplicaLostError(
            self._says(f"lost replica {replica.index} on {replica.host} with the request in flight")
        )

    def _says(self, predicate: str) -> str:
        return f"deployment '{self._config.deployment_name}' {predicate}"

    def _state(self) -> str:
        if self._stopping.is_set():
            return "stopping"
        return "ready" if self._was_ready else "loading"

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            give_memory_back()
            timeout = self._config.startup_timeout
            if not self._was_ready and time.monotonic() > self._started + timeout:
                details = "; ".join(
                    f"replica {r.index}: {r.detail}" for r in self.membership.replicas if r.state != "ready"
                )
                self._fail(
                    Failure(-1, socket.gethostname(), f"not ready after startup_timeout={timeout:.0f} s: {details}", "")
                )
            self.membership.expire(timeout)

    def _publish(self, entry: Entry) -> None:
        self._registry.publish(entry)
        if self._share:
            self._share.publish(entry)

    async def _keep_entry(self) -> None:
        """Publish the entry whenever something changes, and at least as a heartbeat."""
        while not self._ended:
            assert self._entry is not None
            self._dirty.clear()
            waiting = [r.detail for r in self.membership.replicas if r.state != "ready" and r.detail]
            ready = sum(r.state == "ready" for r in self.membership.replicas)
            detail = f"{ready} of {len(self.membership.replicas)} replicas ready" + (
                f"; {waiting[0]}" if waiting else ""
            )
            self._entry = self._entry.model_copy(
                update={"state": self._state(), "heartbeat": time.time(), "detail": detail}
            )
            try:
                await asyncio.to_thread(self._publish, self._entry)
            except DeploymentError as error:
                self.stop(f"it has lost its name: {error}")
                return
            except (OSError, RegistryError) as error:  # a full or absent filesystem must not end the deployment
                log.warning("the registry entry could not be written: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS if not waiting else 0.5):
                    await self._dirty.wait()


def _place(context: grpc.aio.ServicerContext) -> wire.Place | None:
    named = next((value for key, value in context.invocation_metadata() or () if key == wire.PLACE_KEY), None)
    return wire.Place.parse(named) if isinstance(named, str) else None


async def serve(run: RunDir, address: str, spans_hosts: bool) -> int:
    """Run the balancer at "host:port" until the deployment has ended. Returns the process's exit status."""
    config = run.load_config()
    keys = credentials.load_server(run)
    balancer = Balancer(run, config, keys.as_client)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, balancer.stop, "the balancer was told to end")
    host, port = address.rsplit(":", 1)
    server = transport.create_server(balancer.services(), balancer.admits)
    # On several hosts, login nodes may come in by another interface than the ranks do.
    transport.listen(server, f"{'0.0.0.0' if spans_hosts else host}:{port}", keys)
    await server.start()
    log.info("listening on %s", address)
    job_id = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    ends = await asyncio.to_thread(SlurmJob(job_id).ends) if config.cluster == "slurm" else None
    registry = Registry(config.home)
    claimed = registry.get(config.deployment_name)
    if claimed is None or claimed.run_dir != run.path:
        log.error("the name '%s' is not claimed for this run", config.deployment_name)
        return 1
    await balancer.work(
        claimed.model_copy(
            update={
                "job_id": job_id,
                "incarnation": os.environ.get("SLURM_RESTART_COUNT", "0"),
                "state": "loading",
                "host": socket.gethostname(),
                "address": address,
                "fingerprint": keys.as_client.fingerprint,
                "started": claimed.started or time.time(),
                "ends": ends,
            }
        )
    )
    await server.stop(0.5)
    return 0


def main(run_path: str, address: str, spans_hosts: str) -> None:
    """Run the balancer process."""
    end_with_rank()
    log_to_stderr()
    # A stranger's idle connections, each closed after a moment, must not take the place of anybody's.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(asyncio.run(serve(RunDir(Path(run_path)), address, spans_hosts == "1")))


if __name__ == "__main__":
    main(*sys.argv[1:])
