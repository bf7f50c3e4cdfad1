"""What other processes are, any of which may end while it is looked at."""

from pathlib import Path


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command line; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def program(pid: int) -> str:
    """Return the name of a process's program; "" when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
