"""The directory of one run of a deployment: every file name of it, and who may read it."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mii_hpc.config import MIIConfig
from mii_hpc.errors import RegistryError

LOG_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Failure:
    """Why a run failed, as the rank that saw it wrote it down.

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
class RunDir:
    """The directory of one run. Mode 0700, owned by the user; everything in it is named here.

    It stays after the run has ended, with its logs, until the user removes it.
    """

    path: Path

    @classmethod
    def create(cls, config: MIIConfig) -> RunDir:
        """Make the directory for a new run below the configuration's home, and write the configuration to it."""
        runs = private_folder(config.home, entered_by_group=True) / "runs"
        private_folder(runs)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        run = cls(runs / f"{config.deployment_name}-{stamp}-{secrets.token_hex(3)}")
        for folder in (run.path, run.credentials, run.submitit, run.logs, run.failures):
            private_folder(folder)
        write_atomically(run.config, run._with_tokenizer(config).model_dump_json(indent=2))
        return run

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
        """Key, certificate and token."""
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
    def owner_token(self) -> Path:
        """The token of the owner's clients."""
        return self.credentials / "owner-token"

    @property
    def guest_token(self) -> Path:
        """The token of the group that the deployment is shared with."""
        return self.credentials / "guest-token"

    @property
    def rank_token(self) -> Path:
        """The token of the job's own processes."""
        return self.credentials / "rank-token"

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
    def controller_log(self) -> Path:
        """The log of the process that is the job, where there is no Slurm."""
        return self.logs / "controller.log"

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

    def load_config(self) -> MIIConfig:
        """Read the configuration of the run. Raises RegistryError when directory or file cannot be trusted."""
        check_private(self.path)
        return MIIConfig.model_validate_json(self.config.read_text())

    def write_failure(self, failure: Failure) -> None:
        """Leave word of a failure for whoever waits for the deployment."""
        write_atomically(self.failures / f"{failure.rank}.json", json.dumps(asdict(failure)))

    def read_failure(self) -> Failure | None:
        """Return the first failure that was written, or None."""
        written = [(path.stat().st_mtime_ns, path) for path in self.failures.glob("*.json")]
        return Failure(**json.loads(min(written)[1].read_text())) if written else None

    def outputs(self) -> Iterator[Path]:
        """Yield the files that may hold a job's last words, the likeliest first."""
        for folder, pattern in ((self.submitit, "*.err"), (self.submitit, "*.out"), (self.logs, "*.log")):
            yield from sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)


def tail(path: Path, size: int = LOG_TAIL_BYTES) -> str:
    """Return the last `size` bytes of a text file, from the beginning of a line; "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - size)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text.split("\n", 1)[-1] if start else text


def private_folder(path: Path, entered_by_group: bool = False) -> Path:
    """Make a directory with mode 0700 where there is none, and return it.

    Raises RegistryError as check_private() does.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"{path}: cannot be made: {error.strerror}") from error
    check_private(path, entered_by_group)
    return path


def check_private(path: Path, entered_by_group: bool = False) -> None:
    """Raise RegistryError unless the path is ours and closed to others; the message says what mends it.

    `entered_by_group` lets a group pass through a directory, without listing it, to what is shared below it.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise RegistryError(
            f"{path}: belongs to user id {status.st_uid}, and only a folder or file of your own (user id "
            f"{os.geteuid()}) can be trusted; choose another with MII_HPC_HOME or `home`"
        )
    if stat.S_IMODE(status.st_mode) & 0o077 & ~(0o010 if entered_by_group else 0):
        kind = "700" if path.is_dir() else "600"
        raise RegistryError(
            f"{path}: mode {stat.S_IMODE(status.st_mode):04o} lets others in; mend it with: chmod {kind} {path}"
        )


def write_atomically(path: Path, text: str, mode: int = 0o600, group_id: int = -1) -> None:
    """Write a file so that a reader on any node sees all of it or none. -1 leaves the group as it is.

    Written aside in the same directory, flushed to the server, then renamed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchown(file.fileno(), -1, group_id)
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
