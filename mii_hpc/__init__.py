"""DeepSpeed-MII's persistent deployments for Slurm clusters.

    import mii_hpc as mii
    client = mii.serve("mistralai/Mistral-7B-v0.1", tensor_parallel=2, replica_num=2)   # on a login node
    client = mii.client("mistralai/Mistral-7B-v0.1")                                    # later, from any node
    client(["DeepSpeed is", "Seattle is"], max_new_tokens=128)
    client.terminate_server()

Importing this loads neither torch nor MPI: each name but the errors is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mii_hpc.errors import *  # noqa: F403

if TYPE_CHECKING:
    from mii_hpc.api import client as client
    from mii_hpc.api import serve as serve
    from mii_hpc.clients.asynchronous import AsyncMIIClient as AsyncMIIClient
    from mii_hpc.clients.blocking import MIIClient as MIIClient
    from mii_hpc.clients.status import DeploymentStatus as DeploymentStatus
    from mii_hpc.clients.status import ReplicaStatus as ReplicaStatus
    from mii_hpc.config import EngineConfig as EngineConfig
    from mii_hpc.config import GenerateParamsConfig as GenerateParamsConfig
    from mii_hpc.config import LimitsConfig as LimitsConfig
    from mii_hpc.config import MIIConfig as MIIConfig
    from mii_hpc.config import MIIWarning as MIIWarning
    from mii_hpc.config import ModelConfig as ModelConfig
    from mii_hpc.config import SlurmConfig as SlurmConfig
    from mii_hpc.constants import DeploymentType as DeploymentType
    from mii_hpc.constants import GenerationFinishReason as GenerationFinishReason
    from mii_hpc.constants import TaskType as TaskType
    from mii_hpc.deployments.state import DeploymentState as DeploymentState
    from mii_hpc.generation import Chat as Chat
    from mii_hpc.generation import Description as Description
    from mii_hpc.generation import Histogram as Histogram
    from mii_hpc.generation import Load as Load
    from mii_hpc.generation import Response as Response
    from mii_hpc.generation import Tokenization as Tokenization
    from mii_hpc.pipelines import MIIAsyncPipeline as MIIAsyncPipeline
    from mii_hpc.pipelines import MIIPipeline as MIIPipeline
    from mii_hpc.pipelines import async_pipeline as async_pipeline
    from mii_hpc.pipelines import pipeline as pipeline

__version__ = "0.1.0"

_HOMES = {
    "api": ("client", "serve"),
    "clients.asynchronous": ("AsyncMIIClient",),
    "clients.blocking": ("MIIClient",),
    "clients.status": ("DeploymentStatus", "ReplicaStatus"),
    "config": (
        "EngineConfig",
        "GenerateParamsConfig",
        "LimitsConfig",
        "MIIConfig",
        "MIIWarning",
        "ModelConfig",
        "SlurmConfig",
    ),
    "constants": ("DeploymentType", "GenerationFinishReason", "TaskType"),
    "deployments.state": ("DeploymentState",),
    "generation": ("Chat", "Description", "Histogram", "Load", "Response", "Tokenization"),
    "pipelines": ("MIIAsyncPipeline", "MIIPipeline", "async_pipeline", "pipeline"),
}


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_MODULE_OF, *(name for name, value in globals().items() if _is_error(value))])


def __getattr__(name: str) -> Any:
    if name in ("config", "constants", "errors"):  # as `mii.config.MIIConfig` after `import mii`
        return importlib.import_module(f"mii_hpc.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mii_hpc' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mii_hpc.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
