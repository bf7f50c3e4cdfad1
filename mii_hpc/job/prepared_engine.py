"""An engine process that is started before its rank knows what it is to do: what engines import takes seconds."""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from mii_hpc.deployments.rundir import RunDir
from mii_hpc.job.process import Child

_ORDER_BYTES = 65536


class Order(NamedTuple):
    """What an engine process is to do: its EngineSpec, but for what the configuration says, and where to listen."""

    spec: dict[str, Any]
    listen_host: str


@dataclass(frozen=True)
class PreparedEngine:
    """An engine process of a rank that waits for its order; it ends when the rank does."""

    rank: int
    child: Child
    _orders: socket.socket

    @classmethod
    async def start(cls, run: RunDir, rank: int) -> Self:
        """Start the process, which writes to the rank's log of its engine."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            try:
                child = await Child.start(
                    "mii_hpc.job.engine_process",
                    str(run.path),
                    str(number),
                    log=run.engine_log(rank),
                    pass_fds=(number,),
                )
            except BaseException:
                ours.close()
                raise
        return cls(rank, child, ours)

    def take(self, order: Order, store: int | None = None) -> bool:
        """Give it its order, the only one that it gets; return whether it could take one: it may have ended.

        It gets a copy of the descriptor of a store as well, if there is one.
        """
        with closing(self._orders):
            try:
                descriptors = [] if store is None else [store]
                socket.send_fds(self._orders, [json.dumps(order).encode()], descriptors)
            except (BrokenPipeError, ConnectionResetError):
                return False
        return True

    async def end(self) -> None:
        """End the process, whatever it does."""
        self._orders.close()
        await self.child.end(0.0)


def receive_order(number: int) -> Order | None:
    """Wait in an engine process for its order, at the descriptor of that number; None when there is none.

    There is none when the rank has ended, or needs no engine. The store that comes with it gets the same number.
    """
    with socket.socket(fileno=number) as orders:
        message, descriptors, _, _ = socket.recv_fds(orders, _ORDER_BYTES, 1)
        if not message:
            return None
        order = Order(*json.loads(message))
        for store in descriptors:
            # In one go: between a close and a dup2 another thread could open something at this number.
            os.dup2(store, orders.detach(), inheritable=False)
            os.close(store)
            order.spec["store_fd"] = number
            order.spec["store_address"] = order.spec["store_address"] or f"/proc/self/fd/{number}"
    return order
