"""What callers of a deployment see of each fault, on the four-node Slurm cluster of the tests: a table.

`python benchmarks/faults.py [FAULT ...]`, as root; every fault has a deployment of its own, of four echo replicas on
four nodes, and 24 callers. Nothing but this machine takes part.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mii_hpc as mii
from mii_hpc.deployments.registry import Registry
from mii_hpc.schedulers import state_of
from tests.cluster.cluster import Cluster
from tests.processes import command_line

CALLERS = 24
CROWD = 64
WATCH_SECONDS = 75.0
AGAIN_SECONDS = 300.0
"""Of a job that starts again twice: Slurm has it wait until the credentials of its first start have expired."""
HOME_MEGABYTES = 16
DEAD: dict[str, dict[str, bool]] = {
    f"all nodes cut, {CROWD} threads": {},
    f"all nodes cut, {CROWD} threads, --no-requeue": {"no-requeue": True},
}
"""What is asked of sbatch besides. Slurm starts a job again that has lost a node, unless that is forbidden."""


@dataclass
class Seen:
    """What the callers and a watcher have seen, in seconds after the fault."""

    began: float = 0.0
    errors: list[tuple[float, str]] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    longest: float = 0.0
    states: list[tuple[float, str]] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.began


class Trial:
    """One deployment, its callers, and the fault."""

    def __init__(self, cluster: Cluster, home: Path, name: str, **extra: bool) -> None:
        self.cluster, self.home, self.name = cluster, home, name
        self.client = mii.serve(
            deployment_name=name, home=home, cluster="slurm", replica_num=4, startup_timeout=120,
            inference_engine_config={"engine": "echo", "echo_delay": 0.02},
            slurm={"tasks_per_node": 1, "partition": "low", "extra": extra},
        )  # fmt: skip
        entry = Registry(home).get(name)
        assert entry is not None
        self.entry = entry
        self.hosts = [replica.host for replica in self.client.status().replicas]
        self.seen = Seen()
        self._over = threading.Event()

    def process(self, module: str, rank: int) -> int:
        """Return the id of a rank's supervisor ("rank"), engine or balancer process."""
        for pid in self.cluster.job_processes(self.hosts[rank]):
            words = command_line(pid)
            wanted = "submitit.core._submit" if module == "rank" else f"mii_hpc.job.{module}"
            if wanted in words and "srun" not in words[0] and str(self.entry.run_dir) in " ".join(words):
                return pid
        raise LookupError(module)

    def call(self) -> None:
        with mii.MIIClient(self.client.mii_config) as client:
            while not self._over.is_set():
                began = time.monotonic()
                try:
                    client("a b c d e", timeout=30)
                    self.seen.answers.append(self.seen.now())
                except mii.MIIError as error:
                    self.seen.errors.append((self.seen.now(), type(error).__name__))
                    self._over.wait(0.5)
                if self.seen.began:
                    self.seen.longest = max(self.seen.longest, time.monotonic() - began)

    def watch(self) -> None:
        while not self._over.wait(0.2):
            entry = Registry(self.home).get(self.name)
            state = str(entry.state) if entry else "(none)"
            if not self.seen.states or self.seen.states[-1][1] != state:
                self.seen.states.append((self.seen.now(), state))

    @contextlib.contextmanager
    def under_load(self) -> Iterator[None]:
        threads = [threading.Thread(target=self.call) for _ in range(CALLERS)]
        threads.append(threading.Thread(target=self.watch))
        for thread in threads:
            thread.start()
        time.sleep(2)
        self.seen = Seen(time.monotonic())
        yield
        self._over.set()
        for thread in threads:
            thread.join()

    def is_whole(self) -> bool:
        """Whether the registry says so, and every call of the last second was answered."""
        entry, now = Registry(self.home).get(self.name), self.seen.now()
        failed = any(at > now - 1 for at, _ in self.seen.errors)
        answered = any(at > now - 1 for at in self.seen.answers)
        return entry is not None and entry.state == "ready" and answered and not failed

    def left(self) -> list[int]:
        return [pid for node in self.cluster.nodes for pid in self.cluster.job_processes(node)]

    def scancel(self, *options: str) -> None:
        subprocess.run(["scancel", *options, self.entry.job_id], check=True)


def kill(module: str, rank: int) -> Callable[[Trial], None]:
    return lambda trial: os.kill(trial.process(module, rank), signal.SIGKILL)


def freeze(module: str, rank: int) -> Callable[[Trial], None]:
    def freeze_and_thaw(trial: Trial) -> None:
        pid = trial.process(module, rank)
        os.kill(pid, signal.SIGSTOP)

        def thaw() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        threading.Timer(30, thaw).start()

    return freeze_and_thaw


def requeue(trial: Trial) -> None:
    subprocess.run(["scontrol", "requeue", trial.entry.job_id], check=True)


def wait_for_ready(trial: Trial) -> None:
    deadline = time.monotonic() + AGAIN_SECONDS / 2
    while time.monotonic() < deadline and not trial.is_whole():
        time.sleep(0.2)


def preempt(trial: Trial) -> None:
    """Let a job of a partition that goes before need all nodes."""
    job = ["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    subprocess.run(job, check=True, stdout=subprocess.DEVNULL)


def twice(fault: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def again(trial: Trial) -> None:
        fault(trial)
        time.sleep(5)
        wait_for_ready(trial)
        fault(trial)
        time.sleep(5)

    return again


def fill_home(trial: Trial) -> None:
    """Leave no room where registry and run directories are."""
    with contextlib.suppress(OSError), (trial.home / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def suspend(trial: Trial) -> None:
    subprocess.run(["scontrol", "suspend", trial.entry.job_id], check=True)
    time.sleep(25)
    subprocess.run(["scontrol", "resume", trial.entry.job_id], check=True)


FAULTS: dict[str, Callable[[Trial], None]] = {
    "engine killed": kill("engine_process", 2),
    "balancer killed": kill("balancer", 0),
    "supervisor killed": kill("rank", 2),
    "supervisor 0 killed": kill("rank", 0),
    "engine stopped": freeze("engine_process", 2),
    "balancer stopped": freeze("balancer", 0),
    "supervisor stopped": freeze("rank", 2),
    "supervisor 0 stopped": freeze("rank", 0),
    "node cut": lambda trial: trial.cluster.kill_node(trial.hosts[3]),
    "node 0 cut": lambda trial: trial.cluster.kill_node(trial.hosts[0]),
    "suspended for 25 s": suspend,
    "requeued": requeue,
    "requeued twice": twice(requeue),
    "preempted twice": twice(preempt),
    "home full": fill_home,
    "scancel": lambda trial: trial.scancel(),
    "scancel INT": lambda trial: trial.scancel("--signal=INT"),
    "scancel USR1": lambda trial: trial.scancel("--signal=USR1"),
    "scancel batch USR2": lambda trial: trial.scancel("--batch", "--signal=USR2"),
}


def run_crowd(cluster: Cluster, home: Path, fault: str) -> None:
    """Print what many threads that ask see of a deployment whose nodes are all gone without a word."""
    trial = Trial(cluster, home, "crowd", **DEAD[fault])

    def ask(_: int) -> tuple[str, float]:
        try:
            while True:
                trial.client("a b c d e")
        except mii.MIIError as error:
            return type(error).__name__, time.monotonic()

    with ThreadPoolExecutor(CROWD) as pool:
        asking = pool.map(ask, range(CROWD))
        time.sleep(2)
        began = time.monotonic()
        for host in trial.hosts:
            cluster.kill_node(host)
        told = list(asking)
    kinds, times = sorted({kind for kind, _ in told}), [at - began for _, at in told]
    print(f"| {fault} | {len(told)} {'+'.join(kinds)} {min(times):.1f} to {max(times):.1f} s | | | | |", flush=True)
    cluster.reset()


def run(cluster: Cluster, home: Path, fault: str) -> None:
    trial = Trial(cluster, home, fault.replace(" ", "-"))
    with trial.under_load():
        FAULTS[fault](trial)
        whole = None
        trouble = False
        seconds = AGAIN_SECONDS if "twice" in fault else WATCH_SECONDS
        while trial.seen.now() < seconds:
            time.sleep(0.2)
            trouble = trouble or len(trial.seen.states) > 1 or bool(trial.seen.errors) or trial.seen.longest > 1
            if trouble and trial.is_whole() and whole is None and trial.seen.now() > 3:
                whole = trial.seen.now()
            settled = whole is not None and trial.seen.now() > whole + 5 and "stopped" not in fault
            gone = Registry(home).get(trial.name) is None and not trial.left() and trial.seen.now() > 12
            if settled or gone or (whole is not None and trial.seen.now() > 45):
                break
    seen, entry = trial.seen, Registry(home).get(trial.name)
    shown = state_of(entry) if entry else "no entry"
    kinds = sorted({kind for _, kind in seen.errors})
    times = [at for at, _ in seen.errors]
    jobs = [job for job in cluster.squeue() if str(job.id) == trial.entry.job_id]
    print(f"| {fault} | {len(seen.errors)} {'+'.join(kinds)}"
          + (f" {min(times):.1f} to {max(times):.1f} s" if times else "")
          + f", longest call {seen.longest:.1f} s"
          + f" | {', '.join(f'{state} {at:.1f}' for at, state in seen.states)}, shown at the end: {shown}"
          + f" | {f'whole at {whole:.1f} s' if whole else 'not whole' if trouble else 'undisturbed'}"
          + f" | {', '.join(f'{job.state}/{job.reason}' for job in jobs)}", end="", flush=True)  # fmt: skip
    (home / "full").unlink(missing_ok=True)
    with contextlib.suppress(mii.MIIError):
        trial.client.terminate_server()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and trial.left():
        time.sleep(0.2)
    entry = Registry(home).get(trial.name)
    print(f" | {len(trial.left())} processes, {'entry' if entry else 'no entry'} |", flush=True)
    cluster.reset()


def main(*faults: str) -> None:
    """Print a row for each fault."""
    folder = Path(tempfile.mkdtemp(prefix="mii-faults-"))
    folder.chmod(0o755)
    home = folder / "home"
    home.mkdir(0o700)
    # Before the nodes have file systems of their own.
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={HOME_MEGABYTES}m,mode=700", "mii-home", home], check=True)
    with contextlib.ExitStack() as held:
        held.callback(lambda: subprocess.run(["umount", "--lazy", home], check=True))
        cluster = held.enter_context(Cluster(folder / "cluster"))
        os.environ.update(cluster.env)
        print(
            "| fault | callers saw | states, from second | service | job | left after 15 s |\n|---|---|---|---|---|---|"
        )
        for fault in faults or [*FAULTS, *DEAD]:
            try:
                if fault in DEAD:
                    run_crowd(cluster, home, fault)
                else:
                    run(cluster, home, fault)
            except Exception as error:  # noqa: BLE001 (the next fault is still worth its row)
                print(f"| {fault} | {type(error).__name__}: {error}", flush=True)
                cluster.reset()


if __name__ == "__main__":
    main(*sys.argv[1:])
