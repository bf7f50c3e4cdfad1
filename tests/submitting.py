"""Submitting from a test: what a login node does, up to sbatch or the local job's process."""

from mii_hpc.submission import submit as submission


def submitted(config):
    config, placement = submission.shape(submission.check(config))
    run, entry = submission.prepare(config)
    return run, submission.submit(run, entry, config, placement)


def calls(slurm):
    """Return the Slurm commands that were run, each as one line."""
    file = slurm() / "calls"
    return file.read_text().splitlines() if file.exists() else []
