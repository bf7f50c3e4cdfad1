"""What other processes are, any of which may end while it is looked at."""

import contextlib
from pathlib import Path


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_files(pid: int) -> dict[Path, str]:
    """Return where each of a process's open files leads, by its path in /proc, but for those closed meanwhile."""
    found = {}
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[descriptor] = str(descriptor.readlink())
    return found


def program(pid: int) -> str:
    """Return the name of a process's program; "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
