"""How much memory and how many cores a rank may use, and what cache that makes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.blocks import LayerShape
from mii_hpc.errors import ConfigError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

PAGE_SIZE = 32
MAX_BATCH_SIZE = {"cpu": 64, "cuda": 256}
MAX_BATCH_TOKENS = {"cpu": 512, "cuda": 4096}
GUEST_TOKENS = {"cpu": 4, "cuda": 256}
"""With so many tokens a step takes little longer than with one: it waits for the weights to be read."""


@dataclass(frozen=True)
class Budget:
    """The sizes an engine works with; see EngineConfig. Beside the owner, guests have `guest_tokens` of a step."""

    max_batch_size: int
    max_batch_tokens: int
    page_size: int
    num_blocks: int
    guest_tokens: int = GUEST_TOKENS["cpu"]

    def with_blocks(self, num_blocks: int) -> Budget:
        """Return the same with another number of blocks."""
        return replace(self, num_blocks=num_blocks)


def plan_budget(
    spec: EngineSpec, layers: Sequence[LayerShape], context: int, device: torch.device, weights: int
) -> Budget:
    """Choose what the configuration leaves open, and log it.

    The cache takes what the memory leaves, up to what `max_batch_size` sequences of the full context need.
    `weights` are the bytes that this rank's shard takes already.
    Raises ConfigError when there is no room for a useful cache.
    """
    config = spec.model.inference_engine_config
    page_size = config.page_size or PAGE_SIZE
    max_batch_size = config.max_batch_size or MAX_BATCH_SIZE[device.type]
    # Every running sequence must be able to take its one token in each step.
    max_batch_tokens = max(config.max_batch_tokens or MAX_BATCH_TOKENS[device.type], max_batch_size)
    num_blocks = config.num_blocks
    if num_blocks is None:
        block_bytes = page_size * sum(layer.token_bytes() for layer in layers)
        room = _share(spec, device, weights) * config.memory_fraction - weights
        wanted = max_batch_size * -(-context // page_size)
        num_blocks = min(wanted, int(room // block_bytes))
        if num_blocks < 1:
            raise ConfigError(
                f"memory_fraction={config.memory_fraction}: the weights take {weights / 2**30:.1f} GiB on "
                f"this rank and leave no room for a KV cache; use more ranks (tensor_parallel) or memory"
            )
        _log.info("KV cache: %.2f GiB, of %.2f GiB free", num_blocks * block_bytes / 2**30, max(room, 0) / 2**30)
    budget = Budget(max_batch_size, max_batch_tokens, page_size, num_blocks, GUEST_TOKENS[device.type])
    _log.info("%s", budget)
    return budget


def threads(spec: EngineSpec, device: torch.device) -> int:
    """Return the CPU threads of this rank: its share of the cores that the process may run on.

    One beside a GPU: what the host computes there is small, and to share it out takes longer. Measured on 64 cores
    with two ranks: the inputs of a step of 256 sequences took 5 to 9 ms with a share of the cores.
    """
    configured = spec.model.inference_engine_config.threads
    if configured or device.type != "cpu":
        return configured or 1
    return max(1, len(os.sched_getaffinity(0)) // spec.local_world_size)


def compute_with(number: int) -> None:
    """Let the calling thread compute with so many CPU threads, and all other threads of the process as before.

    torch.set_num_threads() sets the number of the calling thread and that of threads which have not computed yet.
    """
    import torch

    if torch.get_num_threads() == number:
        return
    with ThreadPoolExecutor(1) as unused:
        default = unused.submit(torch.get_num_threads).result()
        torch.set_num_threads(number)
        unused.submit(torch.set_num_threads, default).result()


def _share(spec: EngineSpec, device: torch.device, weights: int) -> float:
    """Return the bytes that are for this rank, its weights among them.

    Ranks that share a GPU measure it at different moments, when some have loaded their weights and others have taken
    their caches too. So each counts on an equal part of the whole, or on what is left if that is less.
    """
    if device.type == "cuda":
        import torch

        from mii_hpc.engine.devices import ranks_per_device

        free, total = torch.cuda.mem_get_info(device)
        return share_of_device(free, total, weights, ranks_per_device(spec, torch.cuda.device_count(), os.environ))
    return free_host_memory() / spec.local_world_size + weights


def share_of_device(free: int, total: int, weights: int, sharing: int) -> float:
    """Return the bytes of a GPU that are for one of the `sharing` ranks on it, whose weights it holds already."""
    return min(total / sharing, free + weights)


def free_cached() -> None:
    """Return to the device what torch keeps of memory that is not in use anymore."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_host_memory() -> int:
    """Return the bytes that this process can still take: the host's, or its control group's if less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([available, *_control_group_rooms()])


def _control_group_rooms() -> Iterator[int]:
    """Yield what each control group above this process leaves; page cache counts as free."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cache = "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = Path(root) / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                bound, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if bound != "max":
                yield int(bound) - used + int(statistics.get(cache, 0))
