"""A replica of two ranks, each a process of its own, for the tests of tensor parallelism."""

import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from mii_hpc.config import ModelConfig
from mii_hpc.engine import create_engine
from mii_hpc.engine.base import EngineSpec
from tests.engine.collect import Collected, submit, with_attention
from tests.waiting import PATIENCE


class Replica:
    """Starts the ranks; `answers` sends requests to the leader, all at once, and waits for all."""

    def __init__(self, ranks: int = 2, **model: Any) -> None:
        if 0 < torch.cuda.device_count() < ranks:
            pytest.skip(f"{ranks} ranks take as many GPUs, and there are {torch.cuda.device_count()}")
        context = multiprocessing.get_context("spawn")
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        address = f"127.0.0.1:{self.port}"
        self.connection, theirs = context.Pipe()
        # Bytes by which each rank's peak exceeded what it had before it read the model; known when it has ended.
        self.grown = context.Array("q", ranks)
        self.processes = [
            context.Process(
                target=_process,
                args=(
                    with_attention({"tensor_parallel": ranks, **model}),
                    rank,
                    ranks,
                    address,
                    listener if rank == 0 else None,
                    theirs if rank == 0 else None,
                    self.grown,
                ),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()
        theirs.close()
        listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()

    def ready(self) -> Any:
        """Return None, or what load() raised on the leader."""
        wait([self.connection, *(process.sentinel for process in self.processes)], 240)
        assert self.connection.poll(10), "the ranks are not ready"
        return self.connection.recv()

    def answers(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Any:
        """Send (prompt, options) pairs; return (text, token ids, finish reason) or an error for each."""
        self.connection.send(requests)
        assert self.connection.poll(PATIENCE), "no answers"
        return self.connection.recv()


def _process(*arguments: Any) -> None:
    status = 0
    try:
        _rank(*arguments)
    except Exception:  # noqa: BLE001 (whatever it is ends the rank)
        traceback.print_exc()
        status = 1
    # As the engine process of a deployment leaves, without the interpreter's own end: a thread of gloo's that asks
    # for the GIL meanwhile would be unwound through C++ that lets nothing through, and abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rank(
    model: dict[str, Any],
    rank: int,
    ranks: int,
    address: str,
    listener: socket.socket | None,
    connection: Connection | None,
    grown: Any,
) -> None:
    before = 0

    def progress(sentence: str) -> None:
        nonlocal before
        # By now the libraries are imported and have been used on a small model, and nothing of the real one is read.
        if sentence.startswith("a small model"):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _resident("VmRSS")

    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = EngineSpec(
        ModelConfig(**model),
        rank=rank,
        world_size=ranks,
        local_rank=rank,
        local_world_size=ranks,
        replica_local_size=ranks,
        host="127.0.0.1",
        store_address=address,
        store_fd=listener.detach() if listener else None,
    )
    engine = create_engine(spec)
    try:
        engine.load(progress)
        _have_deepspeed_see_torchs_processor()
    except Exception as error:
        if connection:
            connection.send(repr(error))
        raise
    if not connection:
        engine.run()
        grown[rank] = _resident("VmHWM") - before
        return
    thread = threading.Thread(target=engine.run)
    thread.start()
    connection.send(None)
    try:
        while True:
            collected = [submit(engine, prompt, **options) for prompt, options in connection.recv()]
            connection.send([_result(one) for one in collected])
    except EOFError:
        engine.close()
        thread.join(PATIENCE)
        grown[rank] = _resident("VmHWM") - before


def _have_deepspeed_see_torchs_processor() -> None:
    """DeepSpeed asks the processor itself what it knows, whatever ATEN_CPU_CAPABILITY says."""
    import deepspeed
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX2" and deepspeed.comm.comm.cdb.shm_comm_op is not None:
        deepspeed.comm.comm.cdb.shm_vector_kernel_level = 1


def _resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _result(collected: Collected) -> str | tuple[str, list[int], str]:
    collected.done.wait(PATIENCE)
    if collected.error:
        return repr(collected.error)
    return collected.text(), collected.token_ids(), collected.finish_reason()
