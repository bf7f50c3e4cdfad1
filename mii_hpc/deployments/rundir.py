"""The directory of one run of a deployment: every file name of it, and who may read it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.files import (
    check_private,
    private_folder,
    read_bounded,
    read_text,
    unless_stale,
    write_atomically,
)
from mii_hpc.deployments.registry import PROGRESS, Entry

_STAMP = "%Y%m%d-%H%M%S"
_NAME = re.compile(r"(?P<deployment>.+)-(?P<stamp>\d{8}-\d{6})-[0-9a-f]{6}")


@dataclass(frozen=True)
class Failure:
    """Why a run failed, as the rank that noticed it wrote it.

    Attributes:
        rank: the rank of the world that failed, -1 when it was none in particular.
        host: where.
        message: one sentence.
        log: the end of that rank's log, its traceback included.
    """

    rank: int
    host: str
    message: str
    log: str


@dataclass(frozen=True)
class Report:
    """What a rank that examines its node has found.

    Attributes:
        host: the node.
        address: its address, as other nodes reach it.
        findings: what `mii-hpc doctor --json` printed there.
        met: "yes" once the ranks have met over MPI, or why they have not; empty before that.
    """

    host: str
    address: str
    findings: str
    met: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a run has come: what a balancer must know that is started in place of another.

    Attributes:
        incarnation: the start of the job that this is about; see Entry.
        started: when that was, in seconds since the epoch.
        ready: the replicas that have been ready, by index.
        startup: how many seconds it took until all had been; None before that.
    """

    incarnation: int
    started: float
    ready: tuple[int, ...] = ()
    startup: float | None = None


@dataclass(frozen=True)
class Chain:
    """The place of a run among those that serve one name, one after the other.

    Attributes:
        until: when the last of them ends, in seconds since the epoch.
        predecessor: the run that this one takes the name from; None of the first.
        predecessor_job: the scheduler's id of that one's job.
    """

    until: float
    predecessor: Path | None = None
    predecessor_job: str = ""


@dataclass(frozen=True)
class RunDir:
    """The directory of one run. Mode 0700, owned by the user; everything in it is named here.

    It stays after the run has ended, with its logs, until a later serve() or the user removes it.
    """

    path: Path

    @classmethod
    def create(cls, config: MIIConfig) -> RunDir:
        """Make the directory for a new run below the configuration's home, and write the configuration to it."""
        runs = private_folder(config.home, entered_by_group=True) / "runs"
        private_folder(runs)
        stamp = datetime.now(UTC).strftime(_STAMP)
        run = cls(runs / f"{config.deployment_name}-{stamp}-{secrets.token_hex(3)}")
        try:
            for folder in (run.path, run.credentials, run.submitit, run.logs, run.failures):
                private_folder(folder)
            write_atomically(run.config, run._with_tokenizer(config).model_dump_json(indent=2))
        except BaseException:
            run.remove()
            raise
        return run

    @classmethod
    def ended(cls, home: Path, days: float, in_use: Collection[Path]) -> list[Self]:
        """Return the directories of runs that were submitted more than so many days ago, and are not in use."""
        before = datetime.now(UTC) - timedelta(days=days)
        return [run for run in cls.all(home) if run.path not in in_use and run.created < before]

    def remove(self) -> None:
        """Remove the directory with all that is in it, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)

    @classmethod
    def all(cls, home: Path) -> list[Self]:
        """Return the directories of all runs below a home, whether they go on or have ended, the oldest first."""
        runs = [cls(path) for path in (home / "runs").glob("*") if _NAME.fullmatch(path.name)]
        return sorted(runs, key=lambda run: (run.created, run.path.name))

    @property
    def deployment_name(self) -> str:
        """The deployment that this is or was a run of."""
        return self._parts["deployment"]

    @property
    def created(self) -> datetime:
        """When it was made."""
        return datetime.strptime(self._parts["stamp"], _STAMP).replace(tzinfo=UTC)

    @property
    def _parts(self) -> re.Match[str]:
        parts = _NAME.fullmatch(self.path.name)
        assert parts is not None, f"{self.path}: not a run directory's name"
        return parts

    def _with_tokenizer(self, config: MIIConfig) -> MIIConfig:
        """Return the configuration with the path of its tokenizer, where serve() was given a tokenizer itself."""
        model = config.model_conf
        if model.tokenizer is None or isinstance(model.tokenizer, str):
            return config
        model.tokenizer.save_pretrained(private_folder(self.tokenizer))
        model = model.model_copy(update={"tokenizer": str(self.tokenizer)})
        return config.model_copy(update={"model_conf": model})

    @property
    def config(self) -> Path:
        """The resolved configuration, as JSON."""
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, where serve() was given one and not its name."""
        return self.path / "tokenizer"

    @property
    def credentials(self) -> Path:
        """Keys, certificates and tokens."""
        return self.path / "credentials"

    @property
    def tls_key(self) -> Path:
        """The private key of the deployment's TLS certificate."""
        return self.credentials / "tls.key"

    @property
    def tls_certificate(self) -> Path:
        """The certificate that clients pin."""
        return self.credentials / "tls.crt"

    @property
    def owner_identity(self) -> Path:
        """The key and certificate that the owner's clients show."""
        return self.credentials / "owner.pem"

    @property
    def guest_identity(self) -> Path:
        """The key and certificate that the clients of the group show."""
        return self.credentials / "guest.pem"

    @property
    def owner_token(self) -> Path:
        """The token of the owner's clients."""
        return self.credentials / "owner-token"

    @property
    def guest_token(self) -> Path:
        """The token of the group that the deployment is shared with."""
        return self.credentials / "guest-token"

    @property
    def of_clients(self) -> tuple[Path, ...]:
        """What rotate_token() replaces."""
        return self.owner_token, self.owner_identity, self.guest_token, self.guest_identity

    @property
    def rank_token(self) -> Path:
        """The token of the job's own processes."""
        return self.credentials / "rank-token"

    @property
    def gateway_key(self) -> Path:
        """The private key of the gateway in the job."""
        return self.credentials / "gateway.key"

    @property
    def gateway_certificate(self) -> Path:
        """The gateway's certificate, signed with the deployment's key."""
        return self.credentials / "gateway.crt"

    @property
    def gateway_url(self) -> Path:
        """The URL of the gateway in the job, once it listens."""
        return self.path / "gateway-url"

    @property
    def gateway_log(self) -> Path:
        """The log of the gateway in the job."""
        return self.logs / "gateway.log"

    @property
    def submitit(self) -> Path:
        """Submitit's batch script, pickles, and the ranks' first output."""
        return self.path / "submitit"

    @property
    def logs(self) -> Path:
        """The logs of ranks, engines and balancer."""
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        """One file for each rank that failed for good."""
        return self.path / "failures"

    @property
    def job_log(self) -> Path:
        """What a job without Slurm writes before its ranks have logs of their own."""
        return self.logs / "job.log"

    def rank_log(self, rank: int) -> Path:
        """The log of a rank's supervisor."""
        return self.logs / f"rank-{rank}.log"

    def engine_log(self, rank: int) -> Path:
        """The log of a rank's engine processes."""
        return self.logs / f"engine-{rank}.log"

    @property
    def balancer_log(self) -> Path:
        """The log of the balancer."""
        return self.logs / "balancer.log"

    @property
    def members(self) -> Path:
        """The ranks as they have met, as JSON."""
        return self.path / "members.json"

    def write_members(self, members: Sequence[Mapping[str, Any]]) -> None:
        """Leave word of the ranks for one that is started again."""
        write_atomically(self.members, json.dumps(members))

    def read_members(self) -> list[dict[str, Any]]:
        """Return what write_members() was given; nothing before that."""
        with contextlib.suppress(FileNotFoundError):
            return list(json.loads(self.members.read_text()))
        return []

    def write_report(self, report: Report) -> None:
        """Write what this process has found, in place of what it wrote before."""
        write_atomically(self.logs / f"report-{report.host}-{os.getpid()}.json", json.dumps(asdict(report)))

    def read_reports(self) -> list[Report]:
        """Return what was found, by host."""
        return [Report(**json.loads(read_text(path))) for path in sorted(self.logs.glob("report-*.json"))]

    def rank_process(self, rank: int) -> Path:
        """The id of a rank's supervisor process, and its host."""
        return self.logs / f"rank-{rank}.pid"

    def may_revive(self, every: float) -> bool:
        """Whether this process is the one to start rank 0 again; of all that ask, one is every so many seconds."""
        turns = sorted(self.logs.glob("revival-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if turns and time.time() < turns[-1].stat().st_mtime + every:
            return False
        with contextlib.suppress(FileExistsError):
            (self.logs / f"revival-{len(turns)}").touch(0o600, exist_ok=False)
            return True
        return False

    @property
    def progress(self) -> Path:
        """How far the run has come, as JSON."""
        return self.path / PROGRESS

    def write_progress(self, progress: Progress) -> None:
        """Leave word for the balancer that comes next."""
        write_atomically(self.progress, json.dumps(asdict(progress)))

    def beat(self) -> None:
        """Give a sign of life where there is no room to write one in the registry. Raises OSError."""
        now = time.time()
        os.utime(self.progress, (now, now))

    @property
    def chain(self) -> Path:
        """The run's place in a chain, as JSON."""
        return self.path / "chain.json"

    def write_chain(self, chain: Chain) -> None:
        """Write the run's place in a chain."""
        write_atomically(self.chain, json.dumps({**asdict(chain), "predecessor": str(chain.predecessor or "")}))

    def read_chain(self) -> Chain | None:
        """Return the run's place in a chain; None without one."""
        with contextlib.suppress(FileNotFoundError):
            told = json.loads(read_text(self.chain))
            predecessor = Path(told["predecessor"]) if told["predecessor"] else None
            return Chain(told["until"], predecessor, told["predecessor_job"])
        return None

    @property
    def entry(self) -> Path:
        """The registry entry that the run will have, while another one has the name."""
        return self.path / "entry.json"

    def write_entry(self, entry: Entry) -> None:
        """Write the entry that the run will have."""
        write_atomically(self.entry, entry.model_dump_json(indent=2))

    def read_entry(self) -> Entry | None:
        """Return the entry that the run will have; None before its job was submitted."""
        with contextlib.suppress(FileNotFoundError):
            return Entry.parse(read_bounded(self.entry, owner=os.geteuid()), self.entry)
        return None

    @property
    def successor(self) -> Path:
        """The directory of the run that takes the name next."""
        return self.path / "successor"

    def read_successor(self) -> RunDir | None:
        """Return the run that takes the name next; None when there is none."""
        with contextlib.suppress(FileNotFoundError):
            return RunDir(Path(read_text(self.successor)))
        return None

    def create_successor(self, config: MIIConfig, chain: Chain) -> RunDir:
        """Make the directory of the run that takes the name next, with the same credentials."""
        model = config.model_conf
        run = self.create(config)
        try:
            shutil.copytree(self.credentials, run.credentials, dirs_exist_ok=True)
            if model.tokenizer == str(self.tokenizer):
                shutil.copytree(self.tokenizer, run.tokenizer)
                model = model.model_copy(update={"tokenizer": str(run.tokenizer)})
                write_atomically(run.config, config.model_copy(update={"model_conf": model}).model_dump_json(indent=2))
            run.write_chain(chain)
            write_atomically(self.successor, str(run.path))
        except BaseException:
            run.remove()
            raise
        return run

    def begin(self, incarnation: int) -> Progress:
        """Return how far this start of the job has come; at its beginning, forget what an earlier one has written."""
        with contextlib.suppress(FileNotFoundError):
            told = json.loads(self.progress.read_text())
            if told["incarnation"] == incarnation:
                return Progress(incarnation, told["started"], tuple(told["ready"]), told["startup"])
            for path in self.failures.iterdir():
                path.unlink(missing_ok=True)
        progress = Progress(incarnation, time.time())
        self.write_progress(progress)
        return progress

    def load_config(self) -> MIIConfig:
        """Read the configuration of the run. Raises RegistryError when directory or file cannot be trusted."""
        check_private(self.path)
        return MIIConfig.model_validate_json(self.config.read_text())

    def read_gateway_url(self) -> str:
        """Return the URL of the gateway in the job; empty while there is none."""
        try:
            return self.gateway_url.read_text()
        except FileNotFoundError:
            return ""

    def write_failure(self, failure: Failure) -> None:
        """Write a failure down for serve(), which waits for the deployment."""
        write_atomically(self.failures / f"{failure.rank}.json", json.dumps(asdict(failure)))

    def read_failure(self) -> Failure | None:
        """Return the first failure that was written, or None."""
        written = unless_stale(lambda: [(path.stat().st_mtime_ns, path) for path in self.failures.glob("*.json")])
        return Failure(**json.loads(read_text(min(written)[1]))) if written else None

    def outputs(self) -> Iterator[Path]:
        """Yield the files that may hold the last output of a job, the likeliest first."""
        for folder, pattern in ((self.submitit, "*.err"), (self.submitit, "*.out"), (self.logs, "*.log")):
            yield from sorted(
                folder.glob(pattern), key=lambda path: (path == self.job_log, path.stat().st_mtime), reverse=True
            )
