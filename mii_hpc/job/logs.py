"""The logs of the job's processes."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr() -> None:
    """Send this process's log to its standard error. `MII_HPC_LOG` sets the level; the default is INFO."""
    logging.basicConfig(level=os.environ.get("MII_HPC_LOG", "INFO").upper(), format=_FORMAT, force=True)
    logging.getLogger("submitit").propagate = False  # it writes to standard output itself


def log_to_file(path: Path) -> None:
    """Send this process's log to a file as well."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)
