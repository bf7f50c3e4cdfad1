"""Where operators that were compiled on this host are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch


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


def _is_private(folder: Path) -> bool:
    """Make a folder where there is none, and return whether it is this user's alone."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        status = folder.lstat()
    except OSError:  # a home that is not there, or not to be written
        return False
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o077
