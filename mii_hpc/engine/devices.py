"""Which device a rank computes on, and how many ranks share it."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.waking import leave_gpu
from mii_hpc.errors import ConfigError

_log = logging.getLogger(__name__)


def choose_device(spec: EngineSpec, progress: Callable[[str], None]) -> torch.device:
    """Return the device of this rank, and make it the current one.

    Raises ConfigError when there is no GPU for this rank where the configuration wants one, or Slurm has given the job
    some, and when ranks of one replica would have to share one.
    """
    wanted, host = spec.model.device, socket.gethostname()
    given = gpus_given(os.environ)
    if wanted != "cpu" and not torch.cuda.is_available() and (wanted == "cuda" or given):
        raise ConfigError(
            f"device='{wanted}': {f'Slurm has given this job {given} GPU(s) on {host}, but ' if given else ''}torch "
            f"finds none that it can use on {host}: {_why_no_gpu()}; to serve on CPUs set device='cpu'"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        if wanted != "cpu":
            leave_gpu(spec.local_rank)
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if spec.replica_local_size > max(visible, given or 0):
        raise ConfigError(
            f"tensor_parallel={spec.world_size}: the ranks of a replica take a GPU each, and on {host} there are "
            f"{spec.replica_local_size} of them, but {visible} GPU(s)"
        )
    device = torch.device("cuda", spec.local_rank % visible)
    if given == 0:
        progress(f"Slurm has given this job no GPU on {host}; taking {device} all the same")
    torch.cuda.set_device(device)
    return device


class KernelLimits(NamedTuple):
    """What a device has for kernels: streaming multiprocessors, and bytes of shared memory for each program."""

    processors: int
    shared_memory: int


@functools.cache
def kernel_limits(device: torch.device) -> KernelLimits:
    """Return what a device has for kernels; for Triton's interpreter on CPU, numbers with which all paths are taken."""
    if device.type != "cuda":
        return KernelLimits(1, 2**16)
    properties = torch.cuda.get_device_properties(device)
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 2**16)
    return KernelLimits(properties.multi_processor_count, shared_memory)


@contextmanager
def room_on(device: torch.device) -> Iterator[None]:
    """Raise ConfigError, with what is free, where the device has no room for what is done within this context."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"device: {device} on {socket.gethostname()} has no room for this rank: of its {total / 2**30:.1f} GiB "
            f"{free / 2**30:.1f} are free beside what this and other processes have taken (nvidia-smi lists them); "
            "more ranks (tensor_parallel) take less each"
        ) from error


def gpus_given(environment: Mapping[str, str]) -> int | None:
    """Return how many GPUs of this host Slurm has given to the job step of this process; None outside of jobs."""
    if "SLURM_JOB_ID" not in environment:
        return None
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if count.isdecimal():
        return int(count)
    listed = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""  # before Slurm 20.11
    return len([gpu for gpu in listed.split(",") if gpu])


def ranks_per_device(spec: EngineSpec, visible: int, environment: Mapping[str, str]) -> int:
    """Return how many of the job's ranks on this host use the same device as this one, which sees so many.

    With srun's --gpus-per-task each rank sees but its own, and Slurm says how many the host gives to all of them.
    """
    given = gpus_given(environment) or 0
    if given > visible:
        return -(-spec.local_world_size // given)
    return len(range(spec.local_rank % visible, spec.local_world_size, visible))


def _why_no_gpu() -> str:
    try:
        torch.empty(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # no device or driver; a torch built without CUDA
        return str(error).splitlines()[0].rstrip(".")
    return "it counts no devices"
