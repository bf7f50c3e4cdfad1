"""Two ranks that try how families are sharded, each a process of its own; no model is loaded for it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.errors import ConfigError
from tests.engine.families import Family, config_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def swapped_shards(module: nn.Module, rank: int) -> None:
    """Each rank holds what the other should."""
    (_, layer), *_ = _projections(module, "up_proj")
    layer.weight.data = _of_both(layer.weight)[1 - rank]


def dropped_shard(module: nn.Module, rank: int) -> None:
    """One rank's share is lost."""
    (_, layer), *_ = _projections(module, "down_proj")
    layer.weight.data.mul_(1 - rank)


def key_head_read_twice(module: nn.Module, rank: int) -> None:
    """Both ranks hold the first one's KV heads."""
    (_, layer), *_ = _projections(module, "k_proj")
    layer.weight.data = _of_both(layer.weight)[0]


def dropped_scale(module: nn.Module, rank: int) -> None:
    """The scales of a norm stay as they are made."""
    (_, norm), *_ = _projections(module, "input_layernorm")
    norm.weight.data = norm.weight.data.new_ones(norm.weight.shape)


def one_rank_alone(module: nn.Module, rank: int) -> None:
    """The logits are wrong on one rank, and right on the other."""

    def wrong(module: nn.Module, inputs: Any, output: Any) -> None:
        output.logits *= 1 + rank

    module.register_forward_hook(wrong)


FAULTS = {
    fault.__name__: fault
    for fault in (swapped_shards, dropped_shard, key_head_read_twice, dropped_scale, one_rank_alone)
}
"""What is done to the ranks' sharded modules."""


def _projections(module: nn.Module, name: str) -> list[tuple[str, Any]]:
    return [(full, part) for full, part in module.named_modules() if full.endswith(name)]


def _of_both(share: torch.Tensor) -> list[torch.Tensor]:
    import torch
    import torch.distributed as dist

    shares = [torch.empty_like(share) for _ in range(2)]
    dist.all_gather(shares, share.contiguous())
    return shares


def shardings(families: list[Family], seconds: float, faults: Sequence[str] = ("",)) -> dict[str, str]:
    """Return for each family, by name, how two ranks shard it and attend, or the sentence that refuses it.

    With `faults`, each of FAULTS or "" for none, the names are "family fault".
    """
    cases = [(family, fault) for family in families for fault in faults]
    context = multiprocessing.get_context("spawn")
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    ours, theirs = context.Pipe()
    processes = [
        context.Process(
            target=_rank,
            args=(cases, rank, address, listener if rank == 0 else None, theirs if rank == 0 else None),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    theirs.close()
    listener.close()
    try:
        found: dict[str, str] = {}
        while len(found) < len(cases):
            assert ours.poll(seconds), f"no word of the one after {[*found][-1:]}"
            found.update([ours.recv()])
            print(*[*found.items()][-1], sep=": ", flush=True)
        return found
    finally:
        ours.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _rank(
    cases: list[tuple[Family, str]], rank: int, address: str, listener: socket.socket | None, connection: Any
) -> None:
    import torch
    import transformers

    from mii_hpc.engine.distributed import Ranks
    from mii_hpc.engine.model import check

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = ModelConfig(model_name_or_path="none", tensor_parallel=2)
    spec = EngineSpec(
        model,
        rank=rank,
        world_size=2,
        local_rank=rank,
        local_world_size=2,
        replica_local_size=2,
        host="127.0.0.1",
        store_address=address,
        store_fd=listener.detach() if listener else None,
    )
    device = torch.device("cpu")
    os.environ["DS_ACCELERATOR"] = "cpu"
    ranks = Ranks(spec, device)
    with tempfile.TemporaryDirectory() as folder:
        load_shard = check.__dict__["load_shard"]
        for number, (family, fault) in enumerate(cases):

            def with_fault(*arguments: Any, fault: str = fault) -> Any:
                module = load_shard(*arguments)
                if fault:
                    FAULTS[fault](module, rank)
                return module

            # What is imported there is not exported.
            setattr(check, "load_shard", with_fault)  # noqa: B010
            setattr(check, "extensions_folder", lambda number=number: _made(Path(folder, str(number))))  # noqa: B010
            try:
                serving = check.choose_serving(config_of(family), model, 2, device)
                outcome = f"{serving.sharding}, {serving.way}" if serving else "no small model"
            except ConfigError as error:
                outcome = str(error)
            if connection:
                connection.send((f"{family.name} {fault}".strip(), outcome))
    ranks.minimum(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
