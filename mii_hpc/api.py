"""DeepSpeed-MII's verbs: each reads like the life of a deployment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mii_hpc import schedulers
from mii_hpc.clients.asynchronous import check_live
from mii_hpc.clients.blocking import MIIClient
from mii_hpc.config import MIIConfig, ModelConfig, resolve, validate
from mii_hpc.deployments import lookup
from mii_hpc.deployments.lookup import OwnHome, SharedHome
from mii_hpc.errors import ConfigError
from mii_hpc.submission import startup
from mii_hpc.submission import submit as submission


def serve(
    model_name_or_path: str = "",
    model_config: Mapping[str, Any] | ModelConfig | None = None,
    mii_config: Mapping[str, Any] | MIIConfig | str | Path | None = None,
    **kwargs: Any,
) -> MIIClient:
    """Start a persistent deployment and return a client that is ready to use.

    Keywords are any field of ModelConfig or MIIConfig; `mii_config` may also be a YAML file. The deployment goes
    on after this process has ended, until `terminate_server()`, scancel, or the walltime.

    Raises, before anything is submitted, ConfigError, RegistryError or DeploymentExistsError; SubmissionError with
    the scheduler's message; and, unless `wait=False`, DeploymentFailedError or DeploymentTimeoutError when the
    deployment does not become ready, after which nothing of it remains but its logs.
    """
    config = submission.check(resolve(model_name_or_path, model_config, mii_config, **kwargs))
    config, placement = submission.shape(config)
    run, entry = submission.prepare(config)
    entry = submission.submit(run, entry, config, placement)
    if not config.wait:
        return MIIClient(config)
    startup.wait_until_ready(run, entry, config)
    return MIIClient(OwnHome(config.home).get(config.deployment_name).config)


def client(
    model_or_deployment_name: str,
    mii_config: Mapping[str, Any] | MIIConfig | None = None,
    registry: str | Path | None = None,
) -> MIIClient:
    """Return a client of a running deployment, found by its name or its model's; its `mii_config` is the deployment's.

    Looked for in your own home (`mii_config`, where it is not the default one), then in the homes of those who share
    theirs with you: `registry`, or the colon-separated paths in MII_HPC_PATH. Raises DeploymentNotFoundError when
    there is no such deployment, or more than one serves the model; RegistryError when a home cannot be trusted.
    """
    if not isinstance(model_or_deployment_name, str) or not model_or_deployment_name:
        raise ConfigError(f"model_or_deployment_name={model_or_deployment_name!r}: must be a name")
    home = (mii_config if isinstance(mii_config, MIIConfig) else validate(MIIConfig, mii_config or {})).home
    paths = str(registry) if registry is not None else os.environ.get("MII_HPC_PATH", "")
    shared = [SharedHome(Path(path).expanduser()) for path in paths.split(":") if path]
    found = lookup.find(model_or_deployment_name, [OwnHome(home), *shared], schedulers.is_live)
    check_live(found)
    return MIIClient(found.config, home=found.home)
