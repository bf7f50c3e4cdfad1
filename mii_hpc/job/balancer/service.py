"""The RPC face of the balancer, but for requests, which pass through it unread (see relay.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.job.balancer.access import Access
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.lifetime import Lifetime
from mii_hpc.job.balancer.membership import Membership
from mii_hpc.job.balancer.relay import Relay
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc import transport, wire
from mii_hpc.rpc.remembered import Remembered
from mii_hpc.rpc.wire import Context

log = logging.getLogger(__name__)

GUESTS_SECONDS = 0.5
"""All guests who ask for the status within so long are told the same: it is asked of the replicas, which takes from the
steps of their engines."""


class DeploymentService(pb_grpc.DeploymentServicer):
    """What clients may ask of the deployment as a whole."""

    def __init__(
        self,
        deployment_name: str,
        membership: Membership,
        router: Router,
        access: Access,
        ending: Ending,
        lifetime: Lifetime,
        relay: Relay,
    ) -> None:
        self._deployment_name = deployment_name
        self._membership, self._router, self._access = membership, router, access
        self._ending, self._lifetime, self._relay = ending, lifetime, relay
        self._told_guests = Remembered(self._status, GUESTS_SECONDS)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """Return the state of the deployment and its replicas."""
        async with wire.answering(context):
            with self._relay.counted(transport.token_of(context.invocation_metadata())) as is_guest:
                return await (self._told_guests.value() if is_guest else self._status())

    async def _status(self) -> pb.StatusResponse:
        live = {replica.index: replica for replica in self._router.live}
        loads = dict(zip(live, await asyncio.gather(*(replica.load() for replica in live.values())), strict=True))
        return pb.StatusResponse(
            deployment_name=self._deployment_name,
            state=self._lifetime.state,
            job_id=self._lifetime.job_id,
            replicas=[
                pb.ReplicaStatus(
                    index=replica.index,
                    state=replica.state,
                    host=replica.host,
                    epoch=replica.epoch,
                    in_flight=live[replica.index].in_flight if replica.index in live else 0,
                    served=self._router.served.get(replica.index, 0),
                    detail=replica.detail,
                    load=loads.get(replica.index),
                    migrations=self._relay.migrations[replica.index],
                    resumed=self._relay.resumed[replica.index],
                    lost=self._relay.lost[replica.index],
                )
                for replica in self._membership.replicas
            ],
        )

    async def Terminate(self, request: pb.TerminateRequest, context: Context) -> pb.TerminateResponse:
        """Begin to end the deployment."""
        self._ending.begin("a client asked for it")
        return pb.TerminateResponse()

    async def RotateToken(self, request: pb.RotateTokenRequest, context: Context) -> pb.RotateTokenResponse:
        """Refuse the clients' tokens from now on, and write new ones to their files."""
        async with wire.answering(context):
            await asyncio.to_thread(self._access.rotate)
            if request.cancel_guests:
                self._relay.cancel_guests()
            log.info("the clients' tokens were replaced%s", ", and guests cancelled" if request.cancel_guests else "")
            return pb.RotateTokenResponse()


class MembershipService(pb_grpc.MembershipServicer):
    """Where the supervisors of the ranks report, and get their orders."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    async def Join(
        self, request_iterator: AsyncIterator[pb.RankReport], context: Context
    ) -> AsyncIterator[pb.RankOrder]:
        """Serve the stream of one rank."""
        async with wire.answering(context), contextlib.aclosing(self._membership.join(request_iterator)) as orders:
            async for order in orders:
                yield order
