"""A real Slurm cluster on one machine: every node is a network namespace with a slurmd of its own.

        login side (this machine)      ctl             n1             n2       ...
              10.213.0.1           10.213.0.2     10.213.0.11    10.213.0.12
                   |                    |              |              |
        ===========+====================+==============+==============+======  bridge mii-br

A node has its own address, hostname, /dev/shm and /etc/hosts, because MPI tells hosts apart by these.
It shares the files and the process table with the machine, so /tmp is the cluster's shared filesystem.
The controller and munge live in a namespace too ("ctl"). So whatever a cluster starts is in a namespace
named mii-*, and whatever a killed run left behind is found by that name.

Needs root, and the Debian packages in debian-packages.txt.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from tests.processes import program

PREFIX = "mii-"
BRIDGE = f"{PREFIX}br"
NETWORK = ipaddress.IPv4Network("10.213.0.0/24")
LOGIN_ADDRESS = NETWORK[1]
CONTROLLER = "ctl"
# One cluster at a time: names and addresses are fixed. The kernel drops the lock when its holder dies.
LOCK = Path("/run/mii-cluster.lock")

START_DEADLINE = 90.0
COMMAND_DEADLINE = 60.0
PROGRAMS = ["slurmctld", "slurmd", "srun", "munged", "mpiexec", "ip", "ss", "nsenter", "unshare", "setpriv"]

# Makes a process a node: run as `sh -c SETUP sh HOSTNAME HOSTS COMMAND...` in fresh namespaces.
SETUP = """
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$2" /etc/hosts
shift 2
exec "$@"
"""


# Slurm takes any device for a GPU. It hands them out and sets CUDA_VISIBLE_DEVICES; nobody opens them.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
GPUS = {"g1": "gpu:2", "g2": "gpu:2", "g3": "gpu:a100:4"}
"""The GRES of the nodes in the partitions "gpu" and "typed"."""


class ClusterError(RuntimeError):
    """The cluster could not do what was asked; the message carries the tail of the log that says why."""


class Job(NamedTuple):
    """One line of squeue; ended jobs stay in it for five minutes."""

    id: int
    name: str
    user: str
    partition: str
    state: str
    reason: str
    nodes: str


class ListeningSocket(NamedTuple):
    """A TCP socket that listens, from the kernel's own list."""

    address: str
    port: int
    pids: tuple[int, ...]


def missing() -> str:
    """Why this machine cannot hold the cluster, as a sentence; empty when it can."""
    if os.geteuid() != 0:
        return "The Slurm test cluster builds network namespaces, which takes root."
    absent = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    if absent:
        return f"The Slurm test cluster needs {', '.join(absent)}; on Debian, as root: make setup."
    # Slurm's plugin opens libpmix.so by this name, which only the -dev package has.
    if not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")):
        return "Slurm's PMIx plugin finds no libpmix.so; on Debian, as root: make setup."
    return ""


class Cluster:
    """A Slurm cluster whose nodes are called n1, n2, ..., and those with GPUs g1, ...; use it as a context manager.

    `folder` holds its configuration, keys, logs and state. Every user must be able to enter it, because
    munge's socket is there. Stopping leaves the folder, for its logs.
    """

    def __init__(self, folder: str | Path, nodes: int = 4, cpus_per_node: int = 4) -> None:
        self.folder = Path(folder).absolute()
        self.nodes = [*(f"n{i + 1}" for i in range(nodes)), *GPUS]
        self.cpus_per_node = cpus_per_node
        self._addresses = {CONTROLLER: NETWORK[2]} | {n: NETWORK[11 + i] for i, n in enumerate(self.nodes)}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """What the login side needs in its environment to reach this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}

    def address(self, node: str) -> str:
        """The address of a node on the bridge."""
        return str(self._addresses[node])

    # ---- start and stop

    def start(self) -> None:
        """Build the network, start the daemons and return once every node is idle.

        First clears away what a killed run left behind. When it fails, it leaves nothing behind itself.
        """
        if reason := missing():
            raise ClusterError(reason)
        self._take_lock()
        try:
            _clear()
            _refuse_network_in_use()
            self._write_files()
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "addr", "add", f"{LOGIN_ADDRESS}/{NETWORK.prefixlen}", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            for name in self._addresses:
                self._connect(name)
            self._start_munge()
            self._start_daemon("slurmctld", CONTROLLER, "slurmctld", "-D", "-c")
            for node in self.nodes:
                self._start_slurmd(node)
            self._wait_until_up(self.nodes, since=0)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster and remove its network. Does nothing when it is not running."""
        if self._lock is None:
            return
        _clear()
        for daemon in self._daemons.values():
            daemon.wait(COMMAND_DEADLINE)
        self._daemons.clear()
        self._lock.close()
        self._lock = None

    # ---- nodes

    def run_on(
        self, node: str, argv: Sequence[str | Path], user: str | None = None, **popen: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command on a node, outside of any job, as root or as `user`.

        Takes the options of subprocess.run; captures text and ends after a minute unless told otherwise.
        """
        options = {"text": True, "timeout": COMMAND_DEADLINE} | popen
        if not options.keys() & {"stdout", "stderr", "capture_output"}:
            options["capture_output"] = True
        argv, options = self._inside(node, argv, user, options)
        return subprocess.run(argv, **options)

    def popen_on(
        self, node: str, argv: Sequence[str | Path], user: str | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a node, outside of any job, as root or as `user`. The caller ends it."""
        argv, options = self._inside(node, argv, user, popen)
        return subprocess.Popen(argv, **options)

    def kill_node(self, node: str) -> None:
        """Let a node die: it falls silent, and everything that ran on it is gone without a word.

        Slurm notices after SlurmdTimeout, some 20 s; revived earlier, the node's jobs still count as running.
        """
        self._check(node)
        # The link goes first: closing sockets would otherwise tell the peers at once, as no dead host does.
        _run("ip", "-n", PREFIX + node, "link", "set", "eth0", "down")
        _kill_namespace(PREFIX + node)
        self._daemons.pop(node).wait(COMMAND_DEADLINE)

    def revive_node(self, node: str) -> None:
        """Bring a killed node back, and return once it can take jobs."""
        if node in self._daemons or node not in self.nodes:
            raise ClusterError(f"{node} is not a dead node of this cluster.")
        began = time.time()
        _run("ip", "-n", PREFIX + node, "link", "set", "eth0", "up")
        self._start_slurmd(node)
        self._wait_until_up([node], since=began)

    def reset(self) -> None:
        """Cancel every job without mercy, revive dead nodes, and return once all nodes are idle."""
        for node in self.nodes:
            if node not in self._daemons:
                self.revive_node(node)
        if jobs := self._slurm("squeue", "--noheader", "--format=%i").split():
            self._slurm("scancel", "--quiet", *jobs)

        def waiting_for() -> str:
            # Nobody waits here for KillWait. slurmstepd is spared: it has to report the end.
            everywhere = (pid for node in self.nodes for pid in self.job_processes(node))
            pids = [pid for pid in everywhere if program(pid) != "slurmstepd"]
            _kill(pids)
            return self._slurm("squeue", "--noheader") or (f"processes {pids}" if pids else "")

        self._wait(waiting_for, START_DEADLINE)
        self._wait_until_up(self.nodes, since=0)

    def job_processes(self, node: str) -> list[int]:
        """The processes on a node except slurmd: what jobs (and run_on, popen_on) have there now."""
        slurmd = self._daemons.get(node)
        return [pid for pid in _pids(PREFIX + node) if slurmd is None or pid != slurmd.pid]

    def listening_sockets(self, node: str) -> list[ListeningSocket]:
        """Every TCP socket that listens on a node, slurmd's included."""
        lines = _run("ip", "netns", "exec", PREFIX + node, "ss", "-H", "-ltnp").splitlines()
        found = []
        for line in lines:
            address, _, port = line.split()[3].rpartition(":")
            pids = tuple(int(pid) for pid in re.findall(r"pid=(\d+)", line))
            found.append(ListeningSocket(address.strip("[]"), int(port), pids))
        return found

    def squeue(self, *options: str) -> list[Job]:
        """All jobs, ended ones too. `options` go to squeue, for example "--user=mii-guest"."""
        layout = "%i|%j|%u|%P|%T|%r|%N"
        text = self._slurm("squeue", "--noheader", "--states=all", f"--format={layout}", *options)
        rows = (line.split("|") for line in text.splitlines())
        return [Job(int(row[0]), *row[1:]) for row in rows]

    # ---- inside

    def _take_lock(self) -> None:
        if self._lock is not None:
            raise ClusterError("This cluster is already started.")
        lock = LOCK.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise ClusterError(f"Process {owner} runs another test cluster on this machine.") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def _write_files(self) -> None:
        for stale in ("state", "spool", "tmp"):
            shutil.rmtree(self.folder / stale, ignore_errors=True)
        for name in ("log", "state", *(f"spool/{n}" for n in self.nodes), *(f"tmp/{n}" for n in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        for node in self.nodes:
            (self.folder / "tmp" / node).chmod(0o1777)
        (self.folder / "slurm.conf").write_text(self._slurm_conf())
        (self.folder / "gres.conf").write_text(_gres_conf())
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        names = self._addresses | {f"login {socket.gethostname()}": LOGIN_ADDRESS}
        hosts = "".join(f"{address} {name}\n" for name, address in names.items())
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _slurm_conf(self) -> str:
        folder, cpus = self.folder, self.cpus_per_node
        plain = ",".join(node for node in self.nodes if node not in GPUS)
        lines = [
            "ClusterName=mii",
            f"SlurmctldHost={CONTROLLER}({self.address(CONTROLLER)})",
            "SlurmUser=root",
            # A requeued job waits until the credentials of its first start have expired.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=20",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/spool/%n/slurmd.pid",
            # PMIx makes directories here, which would collide if nodes shared them.
            f"TmpFS={folder}/tmp/%n",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            # Nodes claim more than the machine has.
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "GresTypes=gpu",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            # Quick decisions: a test waits for each of them.
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "KillWait=10",
            "MinJobAge=300",
            "InactiveLimit=0",
            "MessageTimeout=5",
            "SlurmdTimeout=15",
            "BatchStartTimeout=10",
            "ReturnToService=2",
            *(
                f"NodeName={node} NodeAddr={self.address(node)} CPUs={cpus} RealMemory=65536"
                + (f" Gres={GPUS[node]}" if node in GPUS else "")
                for node in self.nodes
            ),
            "PartitionName=DEFAULT MaxTime=UNLIMITED PreemptMode=OFF",
            f"PartitionName=debug Nodes={plain} Default=YES",
            f"PartitionName=short Nodes={plain} MaxTime=00:02:00",
            f"PartitionName=low Nodes={plain} PriorityTier=1 PreemptMode=REQUEUE",
            f"PartitionName=high Nodes={plain} PriorityTier=2",
            "PartitionName=gpu Nodes=g1,g2",
            "PartitionName=typed Nodes=g3",
        ]
        return "\n".join(lines) + "\n"

    def _connect(self, name: str) -> None:
        """Make the namespace of a node and plug it into the bridge."""
        namespace = PREFIX + name
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", namespace, "master", BRIDGE, "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.address(name)}/{NETWORK.prefixlen}", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")

    def _start_munge(self) -> None:
        folder = self.folder
        (folder / "munge.socket").unlink(missing_ok=True)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"seed-file": "munge.seed", "log-file": "log/munged.log"}
        self._start_daemon(
            "munged", CONTROLLER, "munged", "--foreground", *(f"--{k}={folder}/{v}" for k, v in files.items())
        )
        self._wait(lambda: "" if (folder / "munge.socket").exists() else "munged made no socket", START_DEADLINE)

    def _start_slurmd(self, node: str) -> None:
        self._start_daemon(node, node, "slurmd", "-D", "-N", node)

    def _start_daemon(self, name: str, node: str, *argv: str) -> None:
        # `ip netns exec` would hide the cgroup mounts, and slurmd refuses to start without them.
        enter = ["nsenter", f"--net=/run/netns/{PREFIX}{node}", "unshare", "--uts", "--ipc", "--mount"]
        setup = ["sh", "-c", SETUP, "sh", node, str(self.folder / "hosts")]
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*enter, *setup, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=os.environ | self.env,
                start_new_session=True,  # Ctrl-C at the terminal is for us, and we stop them.
            )

    def _wait_until_up(self, nodes: Iterable[str], since: float) -> None:
        """Wait until the nodes' slurmds, started after `since`, have registered and Slurm can use them."""

        def waiting_for() -> str:
            try:
                shown = self._slurm("scontrol", "show", "node", "--oneliner")
            except ClusterError as error:
                return str(error)
            states = [_node_state(line, since) for line in shown.splitlines()]
            down = [f"{name} is {state}" for name, state in states if name in nodes and state != "UP"]
            return ", ".join(down)

        self._wait(waiting_for, START_DEADLINE)

    def _wait(self, waiting_for: Callable[[], str], seconds: float) -> None:
        """Wait until `waiting_for` returns an empty string; says what it said when that takes too long."""
        deadline = time.monotonic() + seconds
        while reason := waiting_for():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} ended with {daemon.returncode}.\n{self._log_tails([name])}")
            if time.monotonic() > deadline:
                raise ClusterError(f"Not ready after {seconds:g} s: {reason}\n{self._log_tails(self._daemons)}")
            time.sleep(0.1)

    def _log_tails(self, names: Iterable[str]) -> str:
        logs = [self.folder / "log" / f"{name}.log" for name in names]
        texts = ((log, log.read_text(errors="replace").splitlines()[-8:]) for log in logs if log.exists())
        return "\n".join(f"--- the end of {log}\n" + "\n".join(lines) for log, lines in texts)

    def _slurm(self, *argv: str) -> str:
        return _run(*argv, env=os.environ | self.env)

    def _check(self, node: str) -> subprocess.Popen[bytes]:
        if node not in self.nodes or node not in self._daemons:
            raise ClusterError(f"{node} is not a live node of this cluster.")
        return self._daemons[node]

    def _inside(
        self, node: str, argv: Sequence[str | Path], user: str | None, options: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """The command line and options that run `argv` in the namespaces of a node's slurmd."""
        target = self._check(node).pid
        env = dict(options.pop("env", None) or os.environ) | self.env
        folder = options.pop("cwd", None) or Path.cwd()
        enter = ["nsenter", f"--target={target}", "--net", "--uts", "--ipc", "--mount", f"--wdns={folder}"]
        if user is not None:
            entry = pwd.getpwnam(user)
            env |= {"USER": user, "LOGNAME": user, "HOME": entry.pw_dir}
            enter += ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--init-groups"]
        return [*enter, *map(str, argv)], options | {"env": env}


def _gres_conf() -> str:
    lines = ["AutoDetect=off"]
    for node, gres in GPUS.items():
        name, *kind, count = gres.split(":")
        types = f" Type={kind[0]}" if kind else ""
        lines += [f"NodeName={node} Name={name}{types} File={device}" for device in DEVICES[: int(count)]]
    return "\n".join(lines) + "\n"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


def _run(*argv: str, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return its output; raises ClusterError with what it complained of."""
    env = env or os.environ | {"PATH": _path()}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_DEADLINE, env=env)
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _node_state(line: str, since: float) -> tuple[str, str]:
    """Name and state of a node from a line of `scontrol show node --oneliner`; UP when it can take jobs."""
    fields = dict(word.partition("=")[::2] for word in line.split())
    name, state, started = fields["NodeName"], fields["State"], fields.get("SlurmdStartTime", "None")
    # Slurm takes a dead node for idle until it notices, so a state counts only with the new slurmd's start.
    if started == "None" or datetime.fromisoformat(started).timestamp() < int(since):
        return name, "SILENT"
    return name, "UP" if state in {"IDLE", "MIXED", "ALLOCATED"} else state


def _refuse_network_in_use() -> None:
    for link in json.loads(_run("ip", "-json", "-4", "addr")):
        for entry in link["addr_info"]:
            if ipaddress.ip_network(f"{entry['local']}/{entry['prefixlen']}", strict=False).overlaps(NETWORK):
                raise ClusterError(f"{link['ifname']} already uses {NETWORK}, the test cluster's network.")


def _namespaces() -> list[str]:
    """Our network namespaces, whoever made them."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"{PREFIX}*")) if folder.exists() else []


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run("ip", "netns", "pids", namespace).split()]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_namespace(namespace: str) -> None:
    """SIGKILL everything in a namespace, and again what was forked meanwhile."""
    deadline = time.monotonic() + COMMAND_DEADLINE
    while pids := _pids(namespace):
        _kill(pids)
        if time.monotonic() > deadline:
            raise ClusterError(f"Processes {pids} of {namespace} survive SIGKILL.")
        time.sleep(0.01)


def _clear() -> None:
    """Remove every process, namespace and link of a cluster, this run's or an earlier one's."""
    for namespace in _namespaces():
        _kill_namespace(namespace)
        _run("ip", "netns", "del", namespace)
    for link in json.loads(_run("ip", "-json", "link")):
        if link["ifname"].startswith(PREFIX):
            with contextlib.suppress(ClusterError):  # a veth of a namespace just deleted may go by itself
                _run("ip", "link", "del", link["ifname"])
