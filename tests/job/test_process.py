import asyncio
import gc
import os
import signal
import subprocess
import sys
import weakref

import pytest

from mii_hpc.job import process
from mii_hpc.job.process import Child, tell
from mii_hpc.job.signals import DRAIN, END_CHILD
from tests.processes import is_running
from tests.waiting import PATIENCE, next_line, until


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Start a child process that runs the given lines of Python; return it and its log."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    started = []

    async def start(lines, *arguments, **options):
        module = f"child_{len(started)}"
        (tmp_path / "modules" / f"{module}.py").write_text(
            "import os, signal, sys, time\nfrom mii_hpc.job.process import end_with_rank, tell\n" + lines
        )
        started.append(await Child.start(module, *arguments, log=tmp_path / "log", **options))
        return started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:
            each.process.kill()


async def said(child):
    """Return the child's next note."""
    return await asyncio.wait_for(child.next_note(), PATIENCE)


async def ended(child):
    """Return the child's exit status."""
    return await asyncio.wait_for(child.process.wait(), PATIENCE)


async def test_notes(child):
    talker = await child("tell(progress='half', of='it ü')\ntell(ready='here')\n")
    assert await said(talker) == {"progress": "half", "of": "it ü"}
    assert await said(talker) == {"ready": "here"}
    assert await said(talker) is None
    assert await ended(talker) == 0


async def test_a_note_cut_short_is_none(child):
    talker = await child("os.write(int(os.environ['MII_HPC_NOTES_FD']), b'{\"progress\":')\n")
    assert await said(talker) is None


async def test_the_end_is_noticed_while_a_grandchild_lives_on_without_the_pipe(child):
    talker = await child(
        "import subprocess\n"
        "p = subprocess.Popen(['sleep', '60'])\ntell(pid=p.pid)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pid = (await said(talker))["pid"]
    assert await said(talker) is None
    os.kill(pid, signal.SIGKILL)


async def test_the_end_is_noticed_while_a_grandchild_lives_on_with_the_pipe(child):
    talker = await child(
        "pid = os.fork()\nif not pid:\n    time.sleep(60)\n"
        "tell(pid=pid)\ntell(last='word')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pid = (await said(talker))["pid"]
    assert await said(talker) == {"last": "word"}
    assert await said(talker) is None
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


def test_tell_outside_a_child_says_nothing():
    tell(ready="nobody listens")


async def test_arguments_output_environment_and_descriptors(child, tmp_path, monkeypatch):
    monkeypatch.setenv("EXTRA", "extra")
    reading, writing = os.pipe()
    (tmp_path / "log").write_text("before\n")
    writer = await child(
        "print('out', *sys.argv[1:], os.environ['EXTRA'])\nprint('err', file=sys.stderr)\n"
        "os.write(int(sys.argv[1]), b'passed')\n",
        str(writing),
        "two",
        pass_fds=(writing,),
    )
    assert await ended(writer) == 0
    assert (tmp_path / "log").read_text() == f"before\nout {writing} two extra\nerr\n"
    os.close(writing)
    assert os.read(reading, 10) == b"passed"
    os.close(reading)


async def test_a_child_is_ended_in_order(child):
    patient = await child(
        "import asyncio\n"
        "async def main():\n"
        "    done = asyncio.Event()\n"
        "    asyncio.get_running_loop().add_signal_handler(signal.SIGRTMIN, done.set)\n"
        "    tell(up=1)\n"
        "    await done.wait()\n"
        "asyncio.run(main())\n"
        "sys.exit(3)\n"
    )
    await said(patient)
    assert await patient.end(PATIENCE) == 3
    assert await patient.end(PATIENCE) == 3, "again does no harm"


async def test_what_its_parent_ignores_and_blocks_ends_a_child_all_the_same(child):
    before = signal.signal(END_CHILD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {END_CHILD})
    try:
        heeding = await child("end_with_rank()\ntell(up=1)\ntime.sleep(60)\n")
    finally:
        signal.signal(END_CHILD, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {END_CHILD})
    await said(heeding)
    assert await heeding.end(PATIENCE) == -END_CHILD


async def test_a_child_that_will_not_end_is_killed(child):
    stubborn = await child("signal.signal(signal.SIGRTMIN, signal.SIG_IGN)\ntell(up=1)\ntime.sleep(60)\n")
    await said(stubborn)
    assert await stubborn.end(0.1) == -signal.SIGKILL


async def test_what_slurm_signals_to_everybody_does_not_reach_a_child(child):
    shielded = await child("end_with_rank()\ntell(up=1)\ntime.sleep(60)\n")
    await said(shielded)
    for signum in DRAIN:
        shielded.process.send_signal(signum)
    assert os.getsid(shielded.process.pid) != os.getsid(0)
    assert await shielded.end(PATIENCE) == -END_CHILD
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(DRAIN)


PARENT = """
import asyncio, sys, time
from pathlib import Path
from mii_hpc.job.process import Child

async def main():
    child = await Child.start("mortal", log=Path(sys.argv[1]))
    print((await child.next_note())["pid"], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_child_dies_with_its_parent(tmp_path):
    (tmp_path / "mortal.py").write_text(
        "import os, time\nfrom mii_hpc.job.process import end_with_rank, tell\n"
        "end_with_rank()\ntell(pid=os.getpid())\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    pid = int(next_line(parent.stdout))
    assert is_running(pid)
    parent.kill()
    parent.wait(PATIENCE)
    parent.stdout.close()
    await until(lambda: not is_running(pid))


async def test_a_very_long_note_is_cut_and_arrives(child):
    talker = await child("tell(failed='a' * 10**6 + 'the end')\ntell(ready='here')\n")
    note = await said(talker)
    assert len(note["failed"]) < 2**16 and note["failed"].startswith("aaa") and note["failed"].endswith("the end")
    assert await said(talker) == {"ready": "here"}


async def test_what_refers_to_itself_is_freed_soon(monkeypatch):
    class Call:
        """As a call of gRPC's that has failed: its error holds it."""

        def __init__(self):
            self.itself = self

    monkeypatch.setattr(process, "GARBAGE_SECONDS", 0.01)
    gc.unfreeze()
    collecting = asyncio.create_task(process.collect_garbage())
    try:
        await until(lambda: gc.get_freeze_count())
        call = weakref.ref(Call())
        await until(lambda: call() is None)
    finally:
        collecting.cancel()
        gc.unfreeze()
