"""Reading files that others may have written: without waiting, without end, and without a surprise."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

SMALL_FILE_BYTES = 2**20


def read_bounded(path: str | Path, limit: int = SMALL_FILE_BYTES, owner: int | None = None) -> bytes:
    """Return what is in a file. It never waits, and never reads more than `limit` bytes.

    Where an `owner` (a user id) is named, only a file that nobody else can have written is read, and no link followed.
    Raises OSError, with EINVAL when it is something else, or longer.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if owner is None else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise _refused(path, "is not a regular file; it is not read") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, "is not a regular file; it is not read")
        if owner is not None and (status.st_uid != owner or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise _refused(path, f"others than user id {owner} could have written it; it is not believed")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise _refused(path, f"is longer than {limit} bytes; it is not read")
    return content


def _refused(path: str | Path, why: str) -> OSError:
    return OSError(errno.EINVAL, why, str(path))
