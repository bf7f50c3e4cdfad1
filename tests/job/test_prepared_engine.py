import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.job.net import private_file
from mii_hpc.job.prepared_engine import Order, PreparedEngine, receive_order
from mii_hpc.job.rendezvous import Member, World
from mii_hpc.job.supervisor import Supervisor
from mii_hpc.job.tasks import Tasks
from mii_hpc.placement import role_of
from mii_hpc.submission import submit as submission
from tests.processes import open_files
from tests.waiting import PATIENCE

SPEC = {
    "rank": 0,
    "world_size": 1,
    "local_rank": 0,
    "local_world_size": 1,
    "replica_local_size": 1,
    "host": "127.0.0.1",
    "store_address": "",
}
ALONE = Order(SPEC, "127.0.0.1")


@pytest.fixture
async def prepare(echo_config):
    """Start an engine process of rank 3, and return it; it ends with the test."""
    run, _ = submission.prepare(echo_config())
    started = []

    async def start():
        started.append(await PreparedEngine.start(run, 3))
        return started[-1]

    start.run = run
    yield start
    for each in started:
        await each.end()


async def note(child, kind):
    """Return what a child says of one kind, the first time; other notes are skipped."""
    while (said := await asyncio.wait_for(child.next_note(), PATIENCE)) is not None:
        if kind in said:
            return said[kind]
    return None


async def test_it_serves_as_ordered(prepare):
    engine = await prepare()
    assert engine.take(ALONE)
    assert (await note(engine.child, "ready")).startswith("127.0.0.1:")
    assert str(prepare.run.engine_log(3)) in open_files(engine.child.pid).values()


async def test_it_gets_the_store_with_the_order(prepare):
    engine = await prepare()
    store = private_file("store")
    inode = os.fstat(store).st_ino
    assert engine.take(ALONE, store)
    os.close(store)
    assert await note(engine.child, "ready")
    (file,) = [file for file, path in open_files(engine.child.pid).items() if path == "/memfd:store (deleted)"]
    assert file.stat().st_ino == inode


@pytest.mark.parametrize(("given", "known"), [("", "/proc/self/fd/{0}"), ("node1:9", "node1:9")])
def test_an_order_tells_where_the_store_is(given, known):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    number, store = theirs.detach(), private_file("store")
    with ours:
        socket.send_fds(ours, [json.dumps([{"store_address": given}, "here"]).encode()], [store])
        order = receive_order(number)
    assert order == ({"store_fd": number, "store_address": known.format(number)}, "here")
    assert os.fstat(number).st_ino == os.fstat(store).st_ino
    os.close(number)
    os.close(store)


async def test_it_ends_well_when_it_gets_no_order(prepare):
    engine = await prepare()
    engine._orders.close()
    assert await asyncio.wait_for(engine.child.wait(), PATIENCE) == 0


async def test_it_can_be_ended_at_any_time(prepare):
    waiting, serving = await prepare(), await prepare()
    assert serving.take(ALONE)
    assert await note(serving.child, "ready")
    for engine in (waiting, serving):
        await asyncio.wait_for(engine.end(), PATIENCE)
        assert engine.child.process.returncode is not None


async def test_one_that_has_ended_takes_no_order(prepare):
    engine = await prepare()
    os.kill(engine.child.pid, signal.SIGKILL)
    await engine.child.wait()
    assert not engine.take(ALONE)


async def test_what_cannot_be_imported_is_told_of_once_it_has_an_order(prepare, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'mii_hpc.job.engine_process' in sys.orig_argv:\n    sys.modules['mii_hpc.engine.echo'] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = await prepare()
    assert engine.take(ALONE)
    assert "ModuleNotFoundError: import of mii_hpc.engine.echo halted" in await note(engine.child, "failed")
    assert await asyncio.wait_for(engine.child.wait(), PATIENCE) == 1
    assert "Traceback" in prepare.run.engine_log(3).read_text()


@pytest.fixture
def rank(prepare):
    """Make the supervisor of a rank that may have an engine process already."""
    world = World(role_of(3, 1), tuple(Member(number, "node0", "127.0.0.1") for number in range(4)))
    return lambda prepared=None: Supervisor(prepare.run, world, "127.0.0.1:1", Tasks(), prepared=prepared)


async def test_a_rank_orders_the_process_that_waits_and_then_others(prepare, rank):
    waiting = await prepare()
    supervised = rank(waiting)
    first = await supervised.spawn_engine(ALONE, None)
    assert first is waiting.child
    second = await supervised.spawn_engine(ALONE, None)
    assert second.pid != first.pid
    for engine in (first, second):
        assert await note(engine, "ready")
        await engine.end(0.0)


async def test_a_rank_whose_waiting_process_has_ended_starts_another(prepare, rank):
    ended = await prepare()
    os.kill(ended.child.pid, signal.SIGKILL)
    await ended.child.wait()
    engine = await rank(ended).spawn_engine(ALONE, None)
    assert await note(engine, "ready")
    await engine.end(0.0)


@pytest.mark.parametrize("prepared", [True, False])
async def test_the_store_is_there_as_soon_as_it_is_told_of(prepare, rank, prepared):
    supervised = rank(await prepare() if prepared else None)
    for epoch in (1, 2):
        await supervised.start_engine(pb.StartEngine(epoch=epoch))
        store = Path(supervised.report.store_address)
        assert store.read_bytes() == b""
    await supervised.stop_engine()
    assert "/memfd:store (deleted)" not in open_files(os.getpid()).values()
