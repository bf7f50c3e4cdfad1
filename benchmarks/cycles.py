"""What many deployments leave behind, one after the other, on this machine: `python benchmarks/cycles.py [CYCLES]`.

Each is served, asked and ended, with an engine that needs no torch. Prints what is there after the first and after the
last: processes, open files and threads of this one, /dev/shm, run directories.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import mii_hpc as mii


@dataclass(frozen=True)
class Left:
    """What is there between two deployments."""

    processes: int
    open_files: int
    threads: int
    shared_memory: int
    runs: int
    registry: int


def left(home: Path) -> Left:
    """Count what is there.

    `processes` are all that have the home in their arguments, `shared_memory` what no process maps: others' comes and
    goes, but is in use.
    """
    shared_memory = {str(path) for path in Path("/dev/shm").iterdir()}  # first: what comes later is not looked for
    processes = 0
    mapped = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            processes += str(home / "runs") in path.read_text()
            mapped |= set(re.findall(r"/dev/shm/\S+", path.with_name("maps").read_text()))
        except OSError:
            continue
    return Left(
        processes=processes,
        open_files=len(list(Path("/proc/self/fd").iterdir())),
        threads=threading.active_count(),
        shared_memory=len({path for path in shared_memory - mapped if Path(path).exists()}),
        runs=len(list((home / "runs").iterdir())),
        registry=len(list((home / "registry").iterdir())),
    )


def has_grown(now: Left, before: Left | None) -> bool:
    """Whether there is more of anything than before."""
    return before is not None and any(value > asdict(before)[name] for name, value in asdict(now).items())


def cycle(home: Path, before: Left | None = None) -> Left:
    """Serve, ask, end; return what is there when the job has ended, and the threads of the client.

    What takes a moment to go, as gRPC's sockets do, has a minute to be no more than before.
    """
    client = mii.serve(
        deployment_name="cycle", home=home, cluster="local", startup_timeout=120,
        inference_engine_config={"engine": "echo"}, keep_runs=1e-6,
    )  # fmt: skip
    assert str(client("once")[0]) == "once "
    client.terminate_server()
    client.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        now = left(home)
        if now.processes + now.threads <= 1 and not has_grown(now, before):
            break
        time.sleep(0.1)
    return now


def main(cycles: str = "200") -> int:
    """Return 0 when nothing has grown since the first cycle, and no process and no entry is left."""
    with tempfile.TemporaryDirectory(prefix="mii-cycles-") as folder:
        home = Path(folder) / "home"
        first = last = cycle(home)
        for number in range(2, int(cycles) + 1):
            last = cycle(home, first)
            if number % 20 == 0:
                print(number, last, flush=True)
    print("first", asdict(first))
    print("last ", asdict(last))
    return int(has_grown(last, first) or bool(last.processes or last.registry))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
