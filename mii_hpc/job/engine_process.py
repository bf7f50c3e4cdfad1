"""One rank's engine process: it loads its shard of the model, and generates together with its replica's other ranks.

`python -m mii_hpc.job.engine_process RUN_DIR DESCRIPTOR` is started by its rank, which ends it. At the descriptor it
gets the rank's order; before that comes, it imports what it needs. On the leader it also answers requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from mii_hpc.config import ModelConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.engine import codec_of, create_engine, import_engine
from mii_hpc.engine.base import Engine, EngineSpec
from mii_hpc.engine.waking import wake_gpu
from mii_hpc.job.inference import InferenceService
from mii_hpc.job.logs import log_to_stderr
from mii_hpc.job.prepared_engine import Order, receive_order
from mii_hpc.job.process import collect_garbage, end_with_rank, raise_file_limit, tell
from mii_hpc.job.signals import END_CHILD
from mii_hpc.job.tasks import Tasks
from mii_hpc.rpc import liveness, transport

log = logging.getLogger(__name__)


class Tell(Protocol):
    """Sends a note to the supervisor.

    `progress`, a sentence; `ready`, the address of a leader, "" of the others; `alive`, from then on.
    """

    def __call__(self, **note: str) -> None: ...


async def serve(engine: Engine, run: RunDir, listen_host: str, leads: bool, tell: Tell) -> None:
    """Load the engine and, on the leader, answer requests at `listen_host` until the task is cancelled.

    Raises the engine's error when it cannot load or go on.
    """
    loop = asyncio.get_running_loop()
    loaded = asyncio.Event()
    ended: asyncio.Future[None] = loop.create_future()

    def end(error: Exception | None) -> None:
        if not ended.done():  # else it was cancelled, and nothing waits for it
            ended.set_exception(error) if error else ended.set_result(None)

    def tell_end(error: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: likewise
            loop.call_soon_threadsafe(end, error)

    def work() -> None:
        try:
            engine.load(lambda sentence: tell(progress=sentence))
            loop.call_soon_threadsafe(loaded.set)
            engine.run()
        except BaseException as error:  # noqa: BLE001 (the thread's boundary: whatever it is ends the process)
            tell_end(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        else:
            tell_end(None)

    threading.Thread(target=work, name="engine", daemon=True).start()
    loading = asyncio.ensure_future(loaded.wait())
    await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
    loading.cancel()
    if ended.done():
        return ended.result()
    model = run.load_config().model_conf
    tasks = Tasks()
    tasks.start(_live(engine if leads else None, model.inference_engine_config.step_timeout, tell))

    async def work_on() -> None:
        await ended

    if not leads:
        tell(ready="")
        return await tasks.guard(work_on())
    keys = credentials.load_server(run)
    service = InferenceService(engine, codec_of(engine, model))
    server = transport.create_server(lambda _method, token: transport.same_token(token, keys.rank_token), service.turn)
    service.add_to(server)
    port = transport.listen(server, f"{listen_host}:0", keys)
    await server.start()
    tell(ready=f"{listen_host}:{port}")
    log.info("answering on %s:%d", listen_host, port)
    try:
        await tasks.guard(work_on())
    finally:
        engine.close()
        await server.stop(0)


async def _live(leader: Engine | None, step_timeout: float, tell: Tell) -> None:
    """Give signs of life. Raises RuntimeError when the leader's engine makes no step with requests in hand."""
    steps, waits = -1, 0
    while True:
        tell(alive="")
        if leader is not None:
            load, before, steps = leader.stats(), steps, leader.steps
            in_hand = load.running + load.waiting
            waits = waits + 1 if in_hand and steps == before else 0
            if waits * liveness.BEAT_SECONDS >= step_timeout:
                raise RuntimeError(f"no step within step_timeout={step_timeout:g} s with {in_hand} requests in hand")
        await asyncio.sleep(liveness.BEAT_SECONDS)


async def run_engine(run: RunDir, spec: EngineSpec, listen_host: str) -> None:
    """Serve until the supervisor ends it."""
    tasks = Tasks()

    def told(**note: str) -> None:
        if "progress" in note:
            log.info("%s", note["progress"])
        tell(**note)
        if "ready" in note:
            tasks.start(collect_garbage())

    serving = asyncio.ensure_future(serve(create_engine(spec), run, listen_host, spec.rank == 0, told))
    asyncio.get_running_loop().add_signal_handler(END_CHILD, serving.cancel)
    await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()


def _prepare(model: ModelConfig, descriptor: int) -> Order | None:
    """Import the model's engine while the rank has no order yet; return the order, once what it says of a GPU is done.

    What goes wrong is raised once there is an order, when the rank listens.
    """

    def receive() -> Order | None:
        order = receive_order(descriptor)
        if order is not None and model.device != "cpu" and model.inference_engine_config.engine != "echo":
            wake_gpu(order.spec["local_rank"])
        return order

    start = time.perf_counter()
    with ThreadPoolExecutor(1, thread_name_prefix="order") as waiting:
        order = waiting.submit(receive)
        gc.disable()  # modules are no garbage, and to look for some would take a fifth of the time
        try:
            import_engine(model)
            gc.freeze()
            log.info("imported the engine in %.1f s", time.perf_counter() - start)
        finally:
            gc.enable()
            order.result()
    return order.result()


def main(run_path: str, descriptor: str) -> None:
    """Run one engine process. Its exit status is 0 when it was told to end, or gets no order, and 1 when it failed."""
    end_with_rank()
    raise_file_limit()
    log_to_stderr()
    # A waiting thread spins for about a millisecond, then sleeps; OpenMP reads this when torch is first imported.
    # Within a step the next piece of work is there sooner than a sleeper could be woken (where none spun, two threads
    # were hardly faster than one); for longer, as is the default, they would take the cores from those who serve.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    # As torch has it; the driver reads it when the GPU's context is made, which may be before torch is there.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    # Else some versions of torch start processes as soon as its compiler is imported.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    run = RunDir(Path(run_path))
    status = 0
    try:
        config = run.load_config()
        order = _prepare(config.model_conf, int(descriptor))
        if order is not None:
            spec = EngineSpec(model=config.model_conf, limits=config.limits, **order.spec)
            asyncio.run(run_engine(run, spec, order.listen_host))
    except Exception as error:
        log.exception("the engine has failed")
        tell(failed=f"{type(error).__name__}: {error}")
        status = 1
    # The engine's thread may be inside a collective that will never return; nothing is left to save.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
