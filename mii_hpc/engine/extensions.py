"""Where operators that were compiled on this host are kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch


def extensions_folder() -> Path:
    """Return a folder for compiled operators that only this user can write to, because its files are executed."""
    base = Path(tempfile.gettempdir()) / f"mii_hpc-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        base.mkdir(mode=0o700)
    status = base.lstat()
    if base.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        base = Path(tempfile.mkdtemp(prefix="mii_hpc-"))
    # What is built against one installation is out of date for any other.
    installation = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    folder = base / f"torch-{torch.__version__}-{installation}"
    folder.mkdir(exist_ok=True)
    return folder
