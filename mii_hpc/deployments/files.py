"""Files on the shared filesystem: who may read them, how they are written, how their end is read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from mii_hpc.errors import RegistryError

LOG_TAIL_BYTES = 8192


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
    """Raise RegistryError unless the path is ours and closed to others; the message says how to correct it.

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
            f"{path}: mode {stat.S_IMODE(status.st_mode):04o} gives others access; correct it with: chmod {kind} {path}"
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
