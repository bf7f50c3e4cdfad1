"""Modules that somebody has put into a folder to be imported there: each leaves word of that, and raises."""

from pathlib import Path

NAMES = ("yaml", "grpc", "pydantic", "submitit", "cloudpickle", "mpi4py", "psutil", "numpy", "torch", "mii_hpc", "json")
MODULE = 'open(__file__ + ".imported", "w").close()\nraise SystemExit(__name__ + " is planted")\n'


def plant(folder: Path) -> Path:
    """Put the modules there, and return the folder."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.py").write_text(MODULE)
    return folder


def imported(folder: Path) -> list[str]:
    """Return the names of those modules that a process has imported."""
    return sorted(path.name.partition(".")[0] for path in folder.glob("*.imported"))
