import importlib
import subprocess
import sys

import mii_hpc

HEAVY = {"torch", "transformers", "deepspeed", "mpi4py", "grpc", "numpy", "submitit"}


def test_the_public_names():
    assert mii_hpc.__all__ == [
        "AsyncMIIClient",
        "AuthenticationError",
        "ConfigError",
        "DeploymentError",
        "DeploymentExistsError",
        "DeploymentFailedError",
        "DeploymentNotFoundError",
        "DeploymentStoppingError",
        "DeploymentTimeoutError",
        "DeploymentType",
        "GenerateParamsConfig",
        "GenerationFinishReason",
        "InvalidRequestError",
        "MIIClient",
        "MIIConfig",
        "MIIError",
        "MIIPipeline",
        "ModelConfig",
        "QueueFullError",
        "RegistryError",
        "ReplicaLostError",
        "RequestCancelledError",
        "RequestError",
        "RequestTimeoutError",
        "Response",
        "SlurmConfig",
        "SubmissionError",
        "TaskType",
        "UnavailableError",
        "UnknownArgument",
        "async_pipeline",
        "client",
        "pipeline",
        "serve",
    ]


def test_each_is_there():
    for name in mii_hpc.__all__:
        assert getattr(mii_hpc, name).__name__ == name
        assert name in dir(mii_hpc)
    assert not hasattr(mii_hpc, "pipelin")


def test_the_modules_that_scripts_reach_through_the_package():
    for name in ("config.MIIConfig", "constants.TaskType", "errors.UnknownArgument"):
        command = f"import mii_hpc as mii; mii.{name}"
        subprocess.run([sys.executable, "-c", command], check=True, timeout=60)


def test_no_module_hides_a_name():
    for module in ("clients", "api", "config", "errors", "pipelines"):
        importlib.import_module(f"mii_hpc.{module}")
    assert callable(mii_hpc.client)
    assert callable(mii_hpc.pipeline)
    assert callable(mii_hpc.serve)


def test_importing_it_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import mii_hpc"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "mii_hpc" in loaded
    assert not loaded & HEAVY
