"""Submitting from a test: what a login node does, up to sbatch or the local job's process."""

from collections.abc import Callable
from pathlib import Path

from mii_hpc.config import MIIConfig
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.submission import submit as submission


def submitted(config: MIIConfig) -> tuple[RunDir, Entry]:
    config, placement = submission.shape(submission.check(config))
    run, entry = submission.prepare(config)
    return run, submission.submit(run, entry, config, placement)


def calls(slurm: Callable[[], Path]) -> list[str]:
    """Return the Slurm commands that were run, each as one line."""
    file = slurm() / "calls"
    return file.read_text().splitlines() if file.exists() else []
