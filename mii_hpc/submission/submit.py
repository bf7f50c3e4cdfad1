"""From a configuration to a job: check it, prepare its run directory, submit it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time

from mii_hpc import schedulers
from mii_hpc.config import MIIConfig
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.lookup import free_name
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.errors import DeploymentError
from mii_hpc.placement import Placement, place
from mii_hpc.submission.checkpoint import check_model

log = logging.getLogger(__name__)


def check(config: MIIConfig) -> MIIConfig:
    """Check all that can be known before the ranks run, and return the resolved configuration.

    Raises ConfigError, SubmissionError when there is no such cluster, or RegistryError when the home directory cannot
    be used.
    """
    cluster = schedulers.choose(config.cluster).name
    if config.shared_group is not None:
        Share(config.home, config.deployment_name, config.shared_group).check()
    return config.model_copy(update={"cluster": cluster, "model_conf": check_model(config.model_conf)})


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
    run = RunDir.create(config)
    try:
        keys = credentials.create(run)
        now = time.time()
        entry = Entry(
            deployment_name=config.deployment_name,
            model=config.model_conf.model_name_or_path or config.model_conf.inference_engine_config.engine,
            tensor_parallel=config.model_conf.tensor_parallel,
            replica_num=config.model_conf.replica_num,
            cluster=schedulers.scheduler(config.cluster).name,
            job_id=job_id,
            fingerprint=keys.fingerprint,
            run_dir=run.path,
            submitted=now,
            heartbeat=now,
        )
        Registry(config.home).claim(entry, schedulers.is_live)
        try:
            sharing.withdraw(config.home, config.deployment_name)  # what a killed run has left
            if config.shared_group is not None:
                Share(config.home, config.deployment_name, config.shared_group).create(run)
        except BaseException:
            free_name(config.home, entry)
            raise
    except BaseException:
        shutil.rmtree(run.path)
        raise
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
        shutil.rmtree(run.path)
        raise
    entry = entry.model_copy(update={"job_id": job.id, "job_host": job.host})
    published = registry.get(config.deployment_name)
    if published is not None and published.state == "pending":  # else the job has begun to write it itself
        with contextlib.suppress(DeploymentError):
            registry.publish(entry)
    log.info("deployment '%s' submitted as job %s; its files are in %s", entry.deployment_name, job.id, run.path)
    return entry
