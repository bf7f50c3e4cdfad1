"""Two ranks that try how families are sharded, each a process of its own; no model is loaded for it."""

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.errors import ConfigError
from tests.engine.families import Family, config_of


def shardings(families: list[Family], seconds: float) -> dict[str, str]:
    """Return for each family, by name, how two ranks shard it and attend, or the sentence that refuses it."""
    context = multiprocessing.get_context("spawn")
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    ours, theirs = context.Pipe()
    processes = [
        context.Process(
            target=_rank,
            args=(families, rank, address, listener if rank == 0 else None, theirs if rank == 0 else None),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    theirs.close()
    listener.close()
    try:
        found: dict[str, str] = {}
        while len(found) < len(families):
            assert ours.poll(seconds), f"no word of the family after {[*found][-1:]}"
            found.update([ours.recv()])
            print(*[*found.items()][-1], sep=": ", flush=True)
        return found
    finally:
        ours.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _rank(families: list[Family], rank: int, address: str, listener: socket.socket | None, connection: Any) -> None:
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
        setattr(check, "extensions_folder", lambda: Path(folder))  # noqa: B010 (what is imported there is not exported)
        for family in families:
            try:
                serving = check.choose_serving(config_of(family), model, 2, device)
                outcome = f"{serving.sharding}, {serving.way}" if serving else "no small model"
            except ConfigError as error:
                outcome = str(error)
            if connection:
                connection.send((family.name, outcome))
    ranks.minimum(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
