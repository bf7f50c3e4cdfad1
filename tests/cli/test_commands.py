import subprocess
import sys

import pytest

import mii_hpc
from mii_hpc import errors
from mii_hpc.cli.output import status_of


def test_no_command_imports_torch():
    code = "import sys, mii_hpc.cli.main; sys.exit(bool({'torch', 'transformers', 'mpi4py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_it_says_its_version(run):
    ran = run("--version")
    assert (ran.status, ran.output) == (0, f"mii-hpc {mii_hpc.__version__}\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UnknownArgument("x"), 2),
        (errors.InvalidRequestError("x"), 2),
        (errors.DeploymentNotFoundError("x"), 3),
        (errors.DeploymentFailedError("x"), 4),
        (errors.UnavailableError("x"), 4),
    ],
)
def test_exit_statuses(error, status):
    assert status_of(error) == status
