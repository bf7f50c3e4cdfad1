"""The registry: one small file per deployment name, on the filesystem that all nodes share.

Entries are written aside and renamed, so a reader sees a whole entry or none. A name is claimed with a
hard link, which exactly one of several claimants can make, over NFS too. No file locks.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mii_hpc.config import MIIConfig, is_name
from mii_hpc.deployments.files import check_private, private_folder, read_bounded, unless_stale, write_atomically
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import DeploymentExistsError, DeploymentNotFoundError, RegistryError
from mii_hpc.printable import printable

log = logging.getLogger(__name__)

CLAIM_TURNS = 200
"""How often to try to replace a stale entry that others replace, too."""
HEARTBEAT_SECONDS = 4.0
SILENT_SECONDS = 3 * HEARTBEAT_SECONDS
"""A heartbeat older than this means that the balancer is down, or cannot write."""
PROGRESS = "progress.json"
"""A file of the run directory; where there is no room to write a heartbeat, the time of this file is one."""
TEXT_LENGTH = 4096
NOT_FOR_GUESTS = Path(os.devnull) / "not-for-guests"
STALE_SECONDS = 60.0
"""A heartbeat older than this, where the job's scheduler cannot be asked, means that the deployment has ended."""


def _as_named(name: str) -> str:
    if not is_name(name):
        raise ValueError("not a name of a deployment")
    return name


Text = Annotated[str, AfterValidator(lambda text: printable(text[:TEXT_LENGTH]))]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Moment = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]


class Entry(BaseModel):
    """What is known of a deployment. Times are seconds since the epoch. Every text is fit to be shown on a terminal.

    Attributes:
        incarnation: how often its job was started before; a requeued job is started again.
        host: the name of the node of rank 0.
        address: "IP:port" of the balancer; empty before it listens.
        gateway: the URL of the gateway in the job; empty without one, or before it listens.
        fingerprint: SHA-256 of the balancer's certificate, in hexadecimal.
        job_id: the scheduler's id of the job; "" before it is submitted, and to guests.
        job_host: the only machine that knows the job's state; "" when every machine of the cluster does.
        run_dir: the run directory; it tells the runs of one name apart.
        ends: when the walltime is over; None without one.
        until: when the uptime is over, through all its jobs; None without one.
        successor: the id of the job that is to take the name next; "" when there is none yet, and to guests.
        detail: what it is doing now, in a few words.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    deployment_name: Annotated[str, AfterValidator(_as_named)]
    model: Text
    tensor_parallel: Annotated[Count, Field(ge=1)]
    replica_num: Annotated[Count, Field(ge=1)]
    cluster: Literal["slurm", "local"]
    job_id: Annotated[str, Field(pattern=r"^([0-9][0-9+_]{0,31})?$")] = ""
    job_host: Text = ""
    state: DeploymentState = DeploymentState.PENDING
    incarnation: Count = 0
    host: Text = ""
    address: Annotated[str, Field(pattern=r"^((\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5})?$")] = ""
    gateway: Annotated[str, Field(pattern=r"^(https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5})?$")] = ""
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")] = ""
    run_dir: Path
    submitted: Moment
    started: Moment | None = None
    ends: Moment | None = None
    until: Moment | None = None
    successor: Annotated[str, Field(pattern=r"^([0-9][0-9+_]{0,31})?$")] = ""
    heartbeat: Moment
    detail: Text = ""

    @classmethod
    def of(cls, config: MIIConfig, run_dir: Path, fingerprint: str, job_id: str = "") -> Self:
        """Return the entry of a new run, from its checked configuration."""
        now = time.time()
        return cls(
            deployment_name=config.deployment_name,
            model=config.model_conf.model_name_or_path or config.model_conf.inference_engine_config.engine,
            tensor_parallel=config.model_conf.tensor_parallel,
            replica_num=config.model_conf.replica_num,
            cluster=config.cluster,
            job_id=job_id,
            fingerprint=fingerprint,
            run_dir=run_dir,
            submitted=now,
            heartbeat=now,
        )

    @classmethod
    def parse(cls, text: bytes, path: Path) -> Self:
        """Return the entry in a file. Raises RegistryError, in one line with the file's name, when it is none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, mistake["loc"]))
            words = f"{where}: {mistake['msg']}" if where else mistake["msg"]
            raise RegistryError(f"{path}: not an entry of the registry: {printable(words)}") from None

    def for_guests(self) -> Self:
        """Return what of it users of a shared deployment read and believe: nothing that is for commands or paths."""
        return self.model_copy(update={"job_id": "", "job_host": "", "successor": "", "run_dir": NOT_FOR_GUESTS})

    @property
    def job(self) -> str:
        """The job as sentences name it."""
        return f"job {self.job_id}" if self.job_id else "job"


class Registry:
    """The registry below one home directory.

    Every method may raise RegistryError when the directory is not this user's own.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / "registry"

    def claim(self, entry: Entry, is_live: Callable[[Entry], bool]) -> None:
        """Take the entry's name for its run.

        Of several claimants of a name exactly one succeeds. Raises DeploymentExistsError when a deployment
        for which `is_live` holds has the name; an entry for which it does not hold is removed.
        """
        private_folder(self.folder)
        path = self._path(entry.deployment_name)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_atomically(aside, entry.model_dump_json(indent=2))
        try:
            for _ in range(CLAIM_TURNS):  # each but the last has met a stale entry; asking of it may take long
                try:
                    os.link(aside, path)
                    return
                except FileExistsError:
                    holder = self._read(path)
                if holder is not None:
                    if holder.run_dir == entry.run_dir:  # an NFS server may answer a repeated request like this
                        return
                    if is_live(holder):
                        raise DeploymentExistsError(
                            f"deployment_name='{holder.deployment_name}': taken by job {holder.job_id or '(new)'}, "
                            f"which is {holder.state}; choose another name, or end that one first",
                            deployment_name=holder.deployment_name,
                        )
                    log.info("removing the stale entry of job %s from the registry", holder.job_id)
                    self.withdraw(holder)
                    time.sleep(0.01)
            raise RegistryError(f"{path}: a stale entry that cannot be removed; remove it with: rm {path}")
        finally:
            aside.unlink(missing_ok=True)

    def publish(self, entry: Entry) -> None:
        """Replace the entry of the same run.

        Raises DeploymentExistsError when the name is now another run's, and DeploymentNotFoundError when the
        entry was withdrawn: a deployment that has lost its name must not take it back.
        """
        self.hand_over(entry.run_dir, entry)

    def hand_over(self, run_dir: Path, entry: Entry) -> None:
        """Replace the entry of a run by that of another, which has the name from then on; see publish().

        Only for the one process that publishes the run's entry.
        """
        path = self._path(entry.deployment_name)
        holder = self._read(path)
        if holder is None:
            raise DeploymentNotFoundError(
                f"{path}: the entry is no longer there", deployment_name=entry.deployment_name
            )
        if holder.run_dir != run_dir:
            raise DeploymentExistsError(
                f"{path}: the name now belongs to job {holder.job_id}", deployment_name=entry.deployment_name
            )
        write_atomically(path, entry.model_dump_json(indent=2))

    def withdraw(self, entry: Entry) -> None:
        """Remove the entry of this run; nothing happens when the name has none, or is another run's."""
        path = self._path(entry.deployment_name)
        holder = self._read(path)
        if holder is None or holder.run_dir != entry.run_dir:
            return
        # Of all processes that remove this run's entry, only the one that makes this link may: so none removes an entry
        # of a run that has claimed the name in between.
        right = path.with_name(f".{path.name}.{sha256(bytes(entry.run_dir)).hexdigest()[:16]}")
        try:
            os.link(path, right)
        except (FileExistsError, FileNotFoundError):
            return
        taken = self._read(right)
        if taken is not None and taken.run_dir == entry.run_dir:
            path.unlink(missing_ok=True)
        right.unlink(missing_ok=True)

    def get(self, deployment_name: str) -> Entry | None:
        """Return the entry of that name, or None."""
        if not self._exists():
            return None
        return self._read(self._path(deployment_name))

    def entries(self) -> list[Entry]:
        """Return all entries, by name. One that cannot be read is logged, and hides no other."""
        if not self._exists():
            return []
        read = []
        for path in sorted(self.folder.glob("[!.]*.json")):
            try:
                read.append(self._read(path))
            except RegistryError as error:
                log.warning("%s", error)
        return [entry for entry in read if entry is not None]

    def _exists(self) -> bool:
        """Whether there is a folder; raises RegistryError when it cannot be trusted, or its home not be entered."""
        try:
            unless_stale(self.folder.stat)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RegistryError(
                f"{self.folder}: cannot be read: {error.strerror}; choose another home with MII_HPC_HOME or `home`"
            ) from None
        check_private(self.folder)
        return True

    def _path(self, deployment_name: str) -> Path:
        return self.folder / f"{deployment_name}.json"

    def _read(self, path: Path) -> Entry | None:
        # Opening it again makes an NFS client ask the server; a stat would be answered from its cache.
        try:
            text = read_bounded(path, owner=os.geteuid())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RegistryError(f"{path}: cannot be read: {error.strerror}") from None
        return Entry.parse(text, path)


def heartbeat_is_fresh(entry: Entry, seconds: float = STALE_SECONDS) -> bool:
    """Whether the deployment has given its heartbeat within so many seconds, if only by the time of a file."""
    now = time.time()
    return now - entry.heartbeat < seconds or now - _written(entry.run_dir / PROGRESS) < seconds


def _written(path: Path) -> float:
    """Return when a file was written, in seconds since the epoch; 0 where there is none."""
    try:
        with path.open("rb") as file:  # which makes an NFS client ask the server
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return 0.0
