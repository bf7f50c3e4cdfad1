"""Files on the shared filesystem: who may read them, how they are written, how their end is read."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mii_hpc import reading
from mii_hpc.errors import RegistryError

T = TypeVar("T")

LOG_TAIL_BYTES = 8192
STALE_READS = 5


def tail(path: Path, size: int = LOG_TAIL_BYTES) -> str:
    """Return the last `size` bytes of a text file, from the beginning of a line; "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - size)
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:  # none, or replaced meanwhile
        return ""
    return text.split("\n", 1)[-1] if start else text


def read_bounded(path: Path, limit: int = reading.SMALL_FILE_BYTES, owner: int | None = None) -> bytes:
    """Return what is in a file that others may have put there. It never waits, and never reads more than `limit` bytes.

    Where an `owner` (a user id) is named, only a file that nobody else can have written is read, and no link followed.
    Raises RegistryError, naming the file, when it is something else or longer; OSError as open() does.
    """
    try:
        return unless_stale(lambda: reading.read_bounded(path, limit, owner))
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise RegistryError(f"{path}: {error.strerror}") from None
        raise


def check_links(path: Path) -> None:
    """Raise RegistryError when a link of another user (but root) is on the way to a path."""
    for each in (path, *path.parents):
        try:
            status = each.lstat()
        except OSError:
            continue
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise RegistryError(
                f"{each}: is a link that belongs to user id {status.st_uid}, who says where it leads; choose another "
                "folder with MII_HPC_HOME or `home`"
            )


def open_to_group(folder: Path, group_id: int, mode: int) -> None:
    """Give a group access to a folder of ours, which is made where there is none.

    Raises RegistryError for a folder of another user, also one that another's link leads to.
    """
    check_links(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if (owner := os.fstat(descriptor).st_uid) != os.geteuid():
            raise RegistryError(f"{folder}: belongs to user id {owner}, and cannot be shared by another")
        os.fchown(descriptor, -1, group_id)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def private_folder(path: Path, entered_by_group: bool = False) -> Path:
    """Make a directory with mode 0700 where there is none, and return it.

    Raises RegistryError as check_private() and check_links() do.
    """
    check_links(path)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"{path}: cannot be made: {error.strerror}") from error
    check_private(path, entered_by_group)
    return path


def check_private(path: Path, entered_by_group: bool = False) -> None:
    """Raise RegistryError unless the path is ours and closed to others; the message says how to correct it.

    `entered_by_group` lets others pass through a directory, without listing it, to what is shared below it.
    """
    try:
        status = unless_stale(path.stat)
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise RegistryError(
            f"{path}: belongs to user id {status.st_uid}, and only a folder or file of your own (user id "
            f"{os.geteuid()}) can be trusted; choose another with MII_HPC_HOME or `home`"
        )
    if stat.S_IMODE(status.st_mode) & 0o077 & ~(0o011 if entered_by_group else 0):
        kind = "700" if path.is_dir() else "600"
        raise RegistryError(
            f"{path}: mode {stat.S_IMODE(status.st_mode):04o} gives others access; correct it with: chmod {kind} {path}"
        )


def unless_stale(read: Callable[[], T]) -> T:
    """Return what a function reads. It is called again where an NFS client says ESTALE: a file was replaced."""
    for _ in range(STALE_READS):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(0.05)
    return read()


def read_text(path: Path) -> str:
    """Return a file's text, also where it is being replaced."""
    return unless_stale(path.read_text)


def write_atomically(path: Path, text: str, mode: int = 0o600, group_id: int = -1) -> None:
    """Write a file so that a reader on any node sees all of it or none. -1 leaves the group as it is.

    Written aside in the same directory, flushed to the server, then renamed.
    """
    write_together(NewFile(path, text, mode, group_id))


@dataclass(frozen=True)
class NewFile:
    """What a file shall be. A group of -1 leaves that as it is."""

    path: Path
    text: str
    mode: int = 0o600
    group_id: int = -1


def write_together(*files: NewFile) -> None:
    """Write files like write_atomically(), all of them, or none where there is no room for all."""
    asides: list[Path] = []
    try:
        for file in files:
            asides.append(_written_aside(file))
        for file, aside in zip(files, asides, strict=True):
            aside.replace(file.path)
    except BaseException:
        for aside in asides:
            aside.unlink(missing_ok=True)
        raise


def _written_aside(new: NewFile) -> Path:
    path = new.path
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchown(file.fileno(), -1, new.group_id)
            os.fchmod(file.fileno(), new.mode)
            file.write(new.text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return aside
