"""The process group of one replica, and the broadcast of the leader's steps to the other ranks."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.extensions import extensions_folder
from mii_hpc.errors import ConfigError

_log = logging.getLogger(__name__)

MEETING_TIMEOUT = timedelta(minutes=30)
# The other ranks wait for the next step as long as there is no request.
IDLE_TIMEOUT = timedelta(days=3650)
HEADER = 2048
"""Numbers that go over at once, such as those of 256 decodes; more take a second message."""


class Ranks:
    """The ranks of a replica that has more than one. Opens no port but at `spec.host`."""

    def __init__(self, spec: EngineSpec, device: torch.device) -> None:
        """Wait for all ranks and hand their group to DeepSpeed.

        Raises ConfigError when some have a GPU and others do not.
        """
        self._store = _store(spec)
        refuse_mixture(self._store, spec, device)
        host, port = _name_of(spec)
        _set_environment(spec, host, port, device)
        works = _shared_memory_works(spec, device)
        with claimed(_shared_buffer(spec, host, port)) if works else contextlib.nullcontext(False) as is_ours:
            use_shared_memory = self._all_can(spec, is_ours)
            if not dist.is_initialized():  # else by an earlier pipeline of the same script, or by the script
                dist.init_process_group(
                    backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    store=PrefixStore("replica", self._store),
                    rank=spec.rank,
                    world_size=spec.world_size,
                    timeout=MEETING_TIMEOUT,
                )
            self._plans = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
            self._sent: list[dist.Work] = []
            import deepspeed

            if not use_shared_memory:
                # Its all-reduce goes through the group above then.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            with quiet():
                deepspeed.init_distributed()
            if use_shared_memory:
                dist.barrier()  # until all have each other's buffers open

    def broadcast(self, numbers: np.ndarray) -> None:
        """Send int32 numbers to all other ranks; for the leader. They may still be on their way when this returns."""
        first, rest = np.split(numbers, [HEADER - 1])
        head = np.zeros(HEADER, dtype=np.int32)
        head[0], head[1 : 1 + len(first)] = len(numbers), first
        parts = [torch.from_numpy(part) for part in (head, rest) if len(part)]
        self.flush()
        self._sent = [dist.broadcast(part, 0, group=self._plans, async_op=True) for part in parts]

    def flush(self) -> None:
        """Wait until all numbers are sent; raises RuntimeError when another rank has ended."""
        for work in self._sent:
            work.wait()
        self._sent = []

    def receive(self) -> np.ndarray:
        """Wait for the leader's next numbers; raises RuntimeError when the leader has ended."""
        head = torch.empty(HEADER, dtype=torch.int32)
        dist.broadcast(head, 0, group=self._plans)
        count = int(head[0])
        numbers = head[1 : 1 + count]
        if count > HEADER - 1:
            rest = torch.empty(count - HEADER + 1, dtype=torch.int32)
            dist.broadcast(rest, 0, group=self._plans)
            numbers = torch.cat([numbers, rest])
        return numbers.numpy()

    def share(self, tensor: torch.Tensor) -> None:
        """Make a tensor on the ranks' devices that of rank 0, in place; on all ranks at once."""
        dist.broadcast(tensor, 0)

    def all_agree(self, own: bool) -> bool:
        """Return whether all ranks say yes."""
        return bool(self.minimum(int(own)))

    def minimum(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._plans)
        return int(tensor)

    def _all_can(self, spec: EngineSpec, own: bool) -> bool:
        self._store.set(f"shared_memory/{spec.rank}", str(int(own)))
        return all(self._store.get(f"shared_memory/{rank}") == b"1" for rank in range(spec.world_size))


def all_agree(own: bool) -> bool:
    """Return whether all ranks of the default group say yes; all are to call it at once."""
    votes = torch.tensor(int(own))
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what libraries print within this context to standard error: the script's output is its own."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def refuse_mixture(store: Store, spec: EngineSpec, device: torch.device) -> None:
    """Raise ConfigError on all ranks when some of the replica compute on GPUs and others on CPUs, which never ends."""
    store.set(f"device/{spec.rank}", f"{device.type} on {socket.gethostname()}")
    devices = [store.get(f"device/{rank}").decode() for rank in range(spec.world_size)]
    if len({each.partition(" ")[0] for each in devices}) > 1:
        raise ConfigError(
            f"device='{spec.model.device}': the ranks of this replica compute on {', '.join(devices)}; choose nodes "
            "that are alike, or set device='cpu'"
        )


def _store(spec: EngineSpec) -> Store:
    host, _, port = spec.store_address.rpartition(":")
    if not host:
        store = FileStore(spec.store_address, spec.world_size)
        store.set_timeout(MEETING_TIMEOUT)
        return store
    return TCPStore(
        host,
        int(port),
        is_master=spec.rank == 0,
        master_listen_fd=spec.store_fd,
        use_libuv=True,
        wait_for_workers=False,
        timeout=MEETING_TIMEOUT,
    )


def _name_of(spec: EngineSpec) -> tuple[str, str]:
    """Return a host and a number, as a port is, that no other replica on this host has at this time."""
    host, _, port = spec.store_address.rpartition(":")
    return (host, port) if host else (spec.host, str(Path(spec.store_address).stat().st_ino))


def _set_environment(spec: EngineSpec, host: str, port: str, device: torch.device) -> None:
    """Set the variables from which DeepSpeed, gloo and NCCL read ranks, addresses and interfaces."""
    interface = _interface_of(spec.host)
    os.environ |= {
        "RANK": str(spec.rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(device.index or 0),
        # DeepSpeed names its shared memory after this address, so replicas on one host never meet there.
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "LOCAL_SIZE": str(spec.world_size),
        "GLOO_SOCKET_IFNAME": interface,
    }
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    # All collectives of a rank are on one stream, captured or not, so NCCL need not order them itself.
    os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def _interface_of(host: str) -> str:
    """Return the name of the network interface that has an address."""
    import psutil

    address = socket.gethostbyname(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    if address.startswith("127."):
        return "lo"
    raise RuntimeError(f"no network interface of this host has the address {address}")


def _shared_memory_works(spec: EngineSpec, device: torch.device) -> bool:
    """Return whether DeepSpeed's all-reduce through shared memory can be used; builds it at first use."""
    if device.type != "cpu" or spec.replica_local_size != spec.world_size:
        return False
    folder = extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # The ninja that was installed with us, also where the environment is not activated; another version of it
    # would find the operator out of date and build it again.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return False
    with (folder / "build.lock").open("w") as lock, quiet():
        # One rank builds and the others wait. The kernel drops this lock with its process, unlike torch's
        # own, which would block all for ever; the process that holds ours knows that torch's is left over.
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / builder.NAME / "lock").unlink(missing_ok=True)
        try:
            builder.load()
        except Exception as error:  # noqa: BLE001 (a compiler can fail in any way, and there is another path)
            _log.warning("shared-memory all-reduce cannot be built, using sockets: %s", error)
            return False
    return True


def _shared_buffer(spec: EngineSpec, host: str, port: str) -> Path:
    """Return the file of this rank's shared buffer. Its name is made in DeepSpeed's csrc/cpu/comm/shm.cpp."""
    return Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{host}_{port}_{spec.rank}")


@contextlib.contextmanager
def claimed(buffer: Path) -> Iterator[bool]:
    """Make the file of a shared buffer; yield whether it is ours: DeepSpeed would take one that another has put there.

    Afterwards it is unlinked, so that it ends with those who have it open. DeepSpeed leaves it when its processes end:
    66 MiB of the host's memory for each rank that was ever started.
    """
    try:
        with contextlib.suppress(OSError):
            buffer.unlink()  # our own is left over from a process that was killed
        os.close(os.open(buffer, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        _log.warning("%s: cannot be made, using sockets in the place of shared memory: %s", buffer, error.strerror)
        yield False
        return
    try:
        yield True
    finally:
        buffer.unlink(missing_ok=True)
