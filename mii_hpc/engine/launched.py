"""The ranks of a pipeline that torchrun or DeepSpeed's launcher has started: each runs the user's whole script.

Loads torch when the ranks meet, not before.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from mii_hpc import errors
from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.errors import MIIError, RequestCancelledError, RequestError, UnavailableError
from mii_hpc.generation import PER_TOKEN, Response

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that a launcher sets for each rank."""
MEETING_TIMEOUT = timedelta(minutes=30)
POLL = timedelta(seconds=1)

_pipelines = itertools.count()


def launched_world_size() -> int:
    """Return how many ranks a launcher has started this script as; 1 where there is no launcher."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


class LaunchedRanks:
    """All ranks of a launcher as one replica.

    Every rank makes the same pipelines, and the same calls of them, in the same order. Rank 0 answers; the others
    wait for the end of each call, which rank 0 writes to the launcher's store.
    """

    def __init__(self, all_rank_output: bool) -> None:
        """Meet the other ranks. With `all_rank_output` they return rank 0's answers, else nothing."""
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self._all_rank_output = all_rank_output
        self._calls = itertools.count()
        store, self.rank, self._world_size = next(rendezvous("env://", timeout=MEETING_TIMEOUT))
        self._store = PrefixStore(f"mii_hpc/{next(_pipelines)}", store)
        self._store.set(f"host/{self.rank}", socket.gethostname())
        self._hosts = [self._store.get(f"host/{rank}").decode() for rank in range(self._world_size)]

    def spec(self, model: ModelConfig) -> EngineSpec:
        """Return this rank's spec."""
        on_this_host = self._hosts.count(self._hosts[self.rank])
        host = "127.0.0.1" if on_this_host == self._world_size else _address_towards(os.environ["MASTER_ADDR"])
        listening = None
        if self.rank == 0:
            # The launcher's own port may be taken by its agent.
            listening = socket.create_server((host, 0))
            self._store.set("replica_store", f"{host}:{listening.getsockname()[1]}")
        return EngineSpec(
            model,
            rank=self.rank,
            world_size=self._world_size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=on_this_host,
            replica_local_size=on_this_host,
            host=host,
            store_address=self._store.get("replica_store").decode(),
            store_fd=listening.detach() if listening else None,
        )

    @contextlib.contextmanager
    def lead(self) -> Iterator[list[Response]]:
        """Make a call on rank 0: the other ranks get the list that this context fills, or the error that it raises."""
        number, answers = next(self._calls), list[Response]()
        try:
            yield answers
        except GeneratorExit:
            self._write(number, answers)
            raise
        except BaseException as error:
            self._write(number, error)
            raise
        self._write(number, answers)

    def follow(self, ended: Callable[[], str | None]) -> list[Response]:
        """Wait on another rank for the end of a call; return what rank 0 has answered, if all ranks return that.

        Raises the error that rank 0 has raised, and UnavailableError when `ended` returns why the engine has ended.
        """
        key = f"call/{next(self._calls)}"
        while not self._is_there(key):
            if (reason := ended()) is not None:
                raise UnavailableError(reason)
        told = json.loads(self._store.get(key))
        if self._store.add(f"{key}/read", 1) == self._world_size - 1:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")
        if "error" in told:
            raise getattr(errors, told["error"])(told["message"])
        return [_response(answer) for answer in told["answers"]]

    def _is_there(self, key: str) -> bool:
        from torch.distributed import DistNetworkError, DistStoreError

        try:
            self._store.wait([key], POLL)
        except DistStoreError:
            return False
        except DistNetworkError as error:
            raise UnavailableError(f"rank 0 has ended: {error}") from error
        return True

    def _write(self, number: int, outcome: list[Response] | BaseException) -> None:
        told: dict[str, Any]
        if isinstance(outcome, MIIError):
            told = {"error": type(outcome).__name__, "message": str(outcome)}
        elif isinstance(outcome, Exception):
            told = {"error": RequestError.__name__, "message": repr(outcome)}
        elif isinstance(outcome, BaseException):
            told = {"error": RequestCancelledError.__name__, "message": f"rank 0 was interrupted: {outcome!r}"}
        else:
            told = {"answers": [dataclasses.asdict(answer) for answer in outcome] if self._all_rank_output else []}
        self._store.set(f"call/{number}", json.dumps(told))


def end_at_exit(close: Callable[[], None]) -> None:
    """Close a pipeline and leave the process group when the interpreter ends, as scripts need not close a pipeline."""
    import torch.distributed as dist

    def end() -> None:
        close()
        if dist.is_initialized():
            dist.destroy_process_group()

    atexit.register(end)


def _address_towards(host: str) -> str:
    """Return the address of this host by which it reaches another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return str(probe.getsockname()[0])


def _response(told: dict[str, Any]) -> Response:
    return Response.from_msg_dict({**told, **{name: _tuples(told[name]) for name in PER_TOKEN}})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
