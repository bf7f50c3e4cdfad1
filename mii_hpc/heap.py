"""The memory that this process has freed and the C library still keeps."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Return all freed memory to the kernel, the holes between what is in use included. Takes milliseconds.

    glibc keeps it otherwise: after a crowd of connections is gone, or when weights were replaced by others of just
    another size. With another C library nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
