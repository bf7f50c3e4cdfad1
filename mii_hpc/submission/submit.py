"""From a configuration to a job: check it, prepare its run directory, submit it."""

from __future__ import annotations

import contextlib
import logging

from mii_hpc import schedulers
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials
from mii_hpc.deployments.lookup import free_name, runs_in_use, take_name
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.errors import ConfigError, DeploymentError, RegistryError
from mii_hpc.placement import Placement, place
from mii_hpc.submission.checkpoint import check_model

log = logging.getLogger(__name__)


def check(config: MIIConfig) -> MIIConfig:
    """Check all that can be known before the ranks run, and return the resolved configuration.

    Raises ConfigError, SubmissionError when there is no such cluster, or RegistryError when the home directory cannot
    be used.
    """
    scheduler = schedulers.choose(config.cluster)
    if config.uptime is not None and not scheduler.has_walltime:
        raise ConfigError(
            f"uptime={config.uptime!r}: with cluster={scheduler.name!r} no job has a walltime after which another "
            "one would have to follow; leave it out"
        )
    if config.shared_group is not None:
        Share(config.home, config.deployment_name, config.shared_group).check()
    return config.model_copy(update={"cluster": scheduler.name, "model_conf": check_model(config.model_conf)})


def shape(config: MIIConfig) -> tuple[MIIConfig, Placement]:
    """Return the configuration of a job that is yet to be submitted, with what the cluster has, and the job's shape.

    `config` is a checked one. Raises ConfigError when the cluster, or nodes as described, cannot hold the deployment.
    """
    config = schedulers.scheduler(config.cluster).fit(config)
    return config, place(config.model_conf, config.slurm)


def prepare(config: MIIConfig, job_id: str = "") -> tuple[RunDir, Entry]:
    """Take the deployment's name and make the run directory with everything that the job needs.

    `config` is a checked one; `job_id` is that of the job which is to run it, where it has begun already. Raises
    DeploymentExistsError when the name is taken, RegistryError when the home directory cannot be used.
    """
    try:
        run = RunDir.create(config)
    except OSError as error:
        raise RegistryError(f"{error.filename or config.home}: cannot be written: {error.strerror}") from error
    try:
        keys = credentials.create(run)
        entry = Entry.of(config, run.path, keys.fingerprint, job_id)
        # A batch script that is requeued prepares itself again; the entry that it finds is that of its earlier start.
        take_name(config, run, entry, lambda holder: holder.job_id != (job_id or None) and schedulers.is_live(holder))
    except OSError as error:
        run.remove()
        raise RegistryError(f"{error.filename or run.path}: cannot be written: {error.strerror}") from error
    except BaseException:
        run.remove()
        raise
    for old in RunDir.ended(config.home, config.keep_runs, runs_in_use(config.home)):
        old.remove()
    return run, entry


def submit(run: RunDir, entry: Entry, config: MIIConfig, placement: Placement) -> Entry:
    """Submit a prepared run and return its entry, now with the job's id.

    Raises SubmissionError with the scheduler's message, after which the name is free again.
    """
    registry = Registry(config.home)
    try:
        job = schedulers.scheduler(entry.cluster).submit(run, config, placement)
    except BaseException:
        free_name(config.home, entry)
        run.remove()
        raise
    entry = entry.model_copy(update={"job_id": job.id, "job_host": job.host})
    published = registry.get(config.deployment_name)
    if (
        published is not None and published.state == DeploymentState.PENDING
    ):  # else the job has begun to write it itself
        with contextlib.suppress(DeploymentError):
            registry.publish(entry)
    log.info("deployment '%s' submitted as job %s; its files are in %s", entry.deployment_name, job.id, run.path)
    return entry
