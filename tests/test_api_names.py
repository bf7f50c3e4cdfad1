import dataclasses
import importlib
import inspect
import os
import subprocess
import sys
import typing

import pytest

import mii_hpc
from mii_hpc import api, config, errors, pipelines

HEAVY = {"torch", "transformers", "deepspeed", "mpi4py", "grpc", "numpy", "submitit"}


def defined_in(module, is_wanted):
    """Return the public names of what a module itself defines."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and is_wanted(value) and value.__module__ == module.__name__
    }


def is_raised(value):
    return inspect.isclass(value) and issubclass(value, BaseException)


def classes_in(annotation):
    """Return the classes of this package that an annotation is made of."""
    if parts := typing.get_args(annotation):
        return {each for part in parts for each in classes_in(part)}
    return {annotation} if inspect.isclass(annotation) and annotation.__module__.startswith("mii_hpc.") else set()


def received_from(exported):
    """Return the classes of this package that a function returns, or that the members of a class are or return."""
    members = vars(exported).items() if inspect.isclass(exported) else [("", exported)]
    functions = [getattr(member, "fget", member) for name, member in members if not name.startswith("_")]
    annotations = [typing.get_type_hints(f).get("return") for f in functions if inspect.isfunction(f)]
    if dataclasses.is_dataclass(exported) or hasattr(exported, "model_fields"):
        annotations += [kind for name, kind in typing.get_type_hints(exported).items() if not name.startswith("_")]
    return {each for annotation in annotations for each in classes_in(annotation)}


def test_the_verbs_are_exported():
    assert defined_in(api, inspect.isfunction) | defined_in(pipelines, inspect.isfunction) <= set(mii_hpc.__all__)


def test_what_is_raised_or_warned_of_is_exported():
    assert defined_in(errors, is_raised) | defined_in(config, is_raised) <= set(mii_hpc.__all__)


@pytest.mark.parametrize("name", mii_hpc.__all__)
def test_it_is_there_and_so_is_what_it_returns(name):
    exported = getattr(mii_hpc, name)
    assert exported.__name__ == name
    assert name in dir(mii_hpc)
    assert getattr(importlib.import_module(exported.__module__), name) is exported
    assert {each.__name__ for each in received_from(exported)} <= set(mii_hpc.__all__)


def test_what_is_not_there():
    assert not hasattr(mii_hpc, "pipelin")
    for hidden in ("before_fork", "after_fork", "check"):
        assert not hasattr(mii_hpc.MIIClient, hidden)


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


def test_neither_import_nor_pipeline_changes_the_environment():
    script = (
        "import os; before = dict(os.environ)\n"
        "import mii_hpc as mii; mii.pipeline(inference_engine_config={'engine': 'echo'}).close()\n"
        "assert dict(os.environ) == before"
    )
    # Those that this process has set when it loaded gRPC.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)


def test_importing_it_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import mii_hpc"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert "mii_hpc" in names
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert {name for name in names if name.startswith("mii_hpc")} == {"mii_hpc", "mii_hpc.errors"}
