"""Operators that are compiled on this host, and where they are kept."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from mii_hpc.engine.processor import compiler_flag

_log = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=gnu++17", "-fPIC", "-fopenmp")
COMPILE_SECONDS = 120


def extensions_folder() -> Path:
    """Return a folder for compiled operators that only this user can write to, because its files are executed.

    All ranks of this host get the same one.
    """
    base = Path(tempfile.gettempdir()) / f"mii_hpc-{os.getuid()}"
    if not _is_private(base):
        # Another user has taken the name; in the home directory nobody can.
        base = Path.home() / ".cache" / f"mii_hpc-{socket.gethostname()}"
        if not _is_private(base):
            base = Path(tempfile.mkdtemp(prefix="mii_hpc-"))
    # What is built against one installation is out of date for any other.
    installation = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    folder = base / f"torch-{torch.__version__}-{installation}"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(source: Path) -> ctypes.CDLL | None:
    """Return the functions of a C++ file, compiled for this processor; None where they cannot be.

    The first process on a host compiles it, in about two seconds, for all.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        return None
    try:
        runtime = _openmp_runtime()
        if runtime is None:
            return None
        library = extensions_folder() / f"{source.stem}-{_fingerprint(source, compiler, runtime)}.so"
        if not library.exists():
            _compile(source, compiler, runtime, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s cannot be compiled, using torch's operators: %s", source.name, error)
        return None


def _compile(source: Path, compiler: str, runtime: str, library: Path) -> None:
    # Made aside and renamed, so that processes that compile it at the same time all find a whole one.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made, linked = Path(folder, "made.o"), Path(folder, "linked.so")
        _run(compiler, *FLAGS, compiler_flag(), "-c", str(source), "-o", str(made))
        # With torch's own OpenMP, so that both share their threads.
        _run(compiler, "-shared", str(made), runtime, "-o", str(linked))
        linked.replace(library)


def _fingerprint(source: Path, compiler: str, runtime: str) -> str:
    """Return what tells libraries apart that are made from other sources, with other tools, for other processors."""
    about = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(about)}
    made_of = "\0".join([source.read_text(), *FLAGS, compiler_flag(), compiler, runtime, *sorted(processor)])
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)


def _openmp_runtime() -> str | None:
    """Return the file of the OpenMP library that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if path.rpartition("/")[2].startswith(("libgomp", "libiomp5", "libomp")):
            return "/" + path
    return None


def _is_private(folder: Path) -> bool:
    """Make a folder where there is none, and return whether it is this user's alone."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        status = folder.lstat()
    except OSError:  # a home that is not there, or not to be written
        return False
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o077
