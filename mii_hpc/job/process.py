"""Child processes of a rank: they shield themselves from its signals and die with it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any, Protocol

from mii_hpc.job.signals import DRAIN, END_CHILD
from mii_hpc.schedulers.base import SAFE_PATH

_PR_SET_PDEATHSIG = 1
_NOTES = "MII_HPC_NOTES_FD"
_PIPE_BYTES = 65536
_NOTE_CHARACTERS = 16384
"""What a note says is cut to this; a long error's beginning and end tell."""
_LINE_BYTES = 2**20
GARBAGE_SECONDS = 1.0
GARBAGE_SHARE = 0.01
"""The part of the time that collecting may take: with 256 streams it takes some 40 ms."""


class ChildProcess(Protocol):
    """A child process of a rank, as its supervisor knows it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    async def next_note(self) -> dict[str, Any] | None:
        """Return the child's next note; None when it has ended, even if children of its own go on."""

    async def wait(self) -> int:
        """Wait for its end and return its exit status: negative, a signal's number, when a signal killed it."""

    async def end(self, grace: float) -> int:
        """End the child: END_CHILD, and after `grace` seconds SIGKILL. Returns its exit status."""


@dataclass
class Child:
    """A running child process and the pipe on which it sends notes.

    What Slurm sends to every process of a job step is for the rank alone, which then ends its children in order. The
    child's output is appended to a log.
    """

    process: asyncio.subprocess.Process
    notes: asyncio.StreamReader
    _ending: asyncio.Task[None]

    @classmethod
    async def start(cls, module: str, *args: str, log: Path, pass_fds: Sequence[int] = ()) -> Child:
        """Run `python -m module args...`; it inherits `pass_fds`."""
        reading, writing = os.pipe()
        with log.open("ab") as output, _signals_blocked(*DRAIN):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *SAFE_PATH,
                "-m",
                module,
                *args,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", _NOTES: str(writing)},
                pass_fds=(*pass_fds, writing),
                start_new_session=True,
            )
        os.close(writing)
        notes = asyncio.StreamReader(_LINE_BYTES)
        pipe = os.fdopen(reading, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(notes), pipe
        )
        return cls(process, notes, asyncio.create_task(_end_notes(process, pipe, notes, transport)))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    async def next_note(self) -> dict[str, Any] | None:
        """See ChildProcess."""
        line = await self.notes.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    async def wait(self) -> int:
        """See ChildProcess."""
        return await self.process.wait()

    async def end(self, grace: float) -> int:
        """See ChildProcess."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(END_CHILD)
            try:
                await asyncio.wait_for(self.process.wait(), grace)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
        return await self.process.wait()


@contextlib.contextmanager
def _signals_blocked(*signums: signal.Signals) -> Iterator[None]:
    """Block signals on this thread; processes started meanwhile keep them blocked until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _end_notes(
    process: asyncio.subprocess.Process, pipe: RawIOBase, notes: asyncio.StreamReader, transport: asyncio.ReadTransport
) -> None:
    """End a child's notes with the child itself: a process that it has forked may hold the pipe open."""
    try:
        await process.wait()
        if not transport.is_closing():
            while rest := pipe.read(_PIPE_BYTES):  # what it said last; none when all is read
                notes.feed_data(rest)
    finally:
        transport.close()


def end_with_rank() -> None:
    """Make this process, which a rank has started, end when the rank tells it to and when the rank ends. Linux.

    When the rank ends, in whatever way, the kernel kills this process.
    """
    signal.signal(END_CHILD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {END_CHILD})
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it ended before prctl() took effect
        os._exit(1)


def raise_file_limit() -> None:
    """Let this process, and those that it starts, open as many files as they may.

    So that idle connections without a token, each closed after a moment, keep nobody from connecting.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def collect_garbage() -> None:
    """Free calls that have failed, again and again: for a process that answers calls, once all that stays is there.

    gRPC and its error refer to each other, and hold the request, of up to 16 MB; a process that makes few objects
    collects them seldom by itself.
    """
    gc.freeze()  # what is there by now is not looked at again, so that it takes no more than milliseconds
    took = 0.0
    while True:
        await asyncio.sleep(max(GARBAGE_SECONDS, took / GARBAGE_SHARE))
        start = time.perf_counter()
        gc.collect()
        took = time.perf_counter() - start


def tell(**note: Any) -> None:
    """Send a note to the rank that started this process. Nothing happens in any other process."""
    descriptor = os.environ.get(_NOTES)
    if descriptor is not None:
        short = {name: _cut(value) if isinstance(value, str) else value for name, value in note.items()}
        line = json.dumps(short).encode() + b"\n"
        while line:
            line = line[os.write(int(descriptor), line) :]


def _cut(text: str) -> str:
    half = _NOTE_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]} ... {text[-half:]}"
