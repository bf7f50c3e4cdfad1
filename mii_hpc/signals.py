"""Signals that are not meant for a child process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def signals_blocked(*signums: signal.Signals) -> Iterator[None]:
    """Block signals on this thread; processes started meanwhile keep them blocked until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
