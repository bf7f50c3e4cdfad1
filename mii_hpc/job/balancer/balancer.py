"""The balancer of one deployment, made of its parts."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from mii_hpc._proto import mii_hpc_pb2_grpc as pb_grpc
from mii_hpc.config import MIIConfig
from mii_hpc.deployments.credentials import ServerCredentials
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import Progress, RunDir
from mii_hpc.job.balancer.access import Access
from mii_hpc.job.balancer.connection import ReplicaConnection
from mii_hpc.job.balancer.ending import Ending
from mii_hpc.job.balancer.lifetime import Lifetime
from mii_hpc.job.balancer.membership import Membership, Replica
from mii_hpc.job.balancer.relay import Relay
from mii_hpc.job.balancer.replacement import Replacements
from mii_hpc.job.balancer.router import Router
from mii_hpc.job.balancer.service import DeploymentService, MembershipService
from mii_hpc.job.balancer.succession import Succession
from mii_hpc.job.tasks import Tasks
from mii_hpc.rpc import transport
from mii_hpc.rpc.frames import StreamGroup
from mii_hpc.rpc.wire import Method
from mii_hpc.schedulers import Job

STOP_SECONDS = 0.5
"""How long calls that are still open at the end may go on."""


class Balancer:
    """The balancer of one deployment. Belongs to the event loop that it is made in."""

    def __init__(
        self,
        run: RunDir,
        config: MIIConfig,
        keys: ServerCredentials,
        progress: Progress,
        job: Job | None = None,
    ) -> None:
        model = config.model_conf
        self._keys = keys
        self.tasks = Tasks()
        self.ending = Ending(run)
        self.access = Access(run, config)
        self.router = Router()
        self._streams = StreamGroup()
        self.membership = Membership(
            model.tensor_parallel,
            model.replica_num,
            admit=self._admit,
            dismiss=self._dismiss,
            on_death=self.ending.on_death,
            on_leaving=self.ending.on_signal,
            tasks=self.tasks,
            ready=progress.ready,
            on_lost=lambda rank, host: self.replacements.lose(rank, host),
        )
        succession = Succession(run, config, progress, job, on_name=self.access.read)

        def start_rank(rank: int, node: str) -> bool:
            if job is None or job.start_rank(run, config, rank, node):
                return True
            succession.hasten()  # which has all its nodes
            return False

        self.replacements = Replacements(self.membership, self.ending, self.tasks, start_rank)
        self.relay = Relay(config, self.router, self.ending, self.access, on_broken=self.membership.lose)
        self.lifetime = Lifetime(
            run, config, progress, self.ending, self.membership, self.router, succession, self.tasks
        )
        deployment = DeploymentService(
            config.deployment_name,
            self.membership,
            self.router,
            self.access,
            self.ending,
            self.lifetime,
            self.relay,
        )
        self.server = transport.create_server(self.access.admits)
        transport.add_inference(
            self.server,
            {
                Method.GENERATE: grpc.stream_stream_rpc_method_handler(self.relay.generate),
                **{each: self.relay.passing(each) for each in (Method.TOKENIZE, Method.DESCRIBE)},
            },
        )
        pb_grpc.add_DeploymentServicer_to_server(deployment, self.server)
        pb_grpc.add_MembershipServicer_to_server(MembershipService(self.membership), self.server)

    async def listen(self, address: str) -> int:
        """Answer at "host:port" from now on; return the port. Raises OSError when it cannot be bound."""
        port = transport.listen(self.server, address, self._keys, lambda: self.access.certificates)
        await self.server.start()
        return port

    async def serve(self, entry: Entry, is_requeued: Callable[[], bool] = lambda: False) -> None:
        """Serve under a registry entry until the deployment has ended, and the entry is gone.

        Raises what a background task has raised; the entry stays then, for the balancer that comes next.
        """
        try:
            await self.tasks.guard(self.lifetime.run(entry, is_requeued))
        finally:
            await self.server.stop(STOP_SECONDS)

    async def _admit(self, replica: Replica, address: str) -> None:
        self.router.add(await ReplicaConnection.open(replica, address, self._keys.as_client, self._streams))

    def _dismiss(self, index: int) -> None:
        connection = self.router.remove(index)
        if connection is not None:
            connection.cancel_requests()
            self.tasks.start(connection.close())
