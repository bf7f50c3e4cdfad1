"""The heap of the C library, which keeps memory that the process has freed."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Return all freed memory to the kernel, also from between what is in use. Takes milliseconds.

    glibc keeps it otherwise, for instance after many connections have closed, or when weights are replaced by others
    of a slightly different size. With another C library nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
