import os
import subprocess
import sys

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments.rundir import RunDir

MPIEXEC = """#!/bin/sh
[ "$1" = --version ] && echo "mpiexec (OpenRTE) 4.1.4" || echo "$@"
"""


@pytest.fixture
def launch(tmp_path):
    """Launch a deployment with the given setup lines, by a Python that has no mpiexec beside it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)

    def start(*setup):
        config = resolve("m", tensor_parallel=2, home=tmp_path / "home", slurm={"setup": setup}, deployment_name="chat")
        run = str(RunDir.create(config).path)
        done = subprocess.run(
            [tmp_path / "bin" / "python", "-c", f"from mii_hpc.job import launch; launch.main({run!r}, None)"],
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return run, done

    return start


def test_mpiexec_may_come_with_the_setup_lines(launch, tmp_path):
    (tmp_path / "module").mkdir()
    mpiexec = tmp_path / "module" / "mpiexec"
    mpiexec.write_text(MPIEXEC)
    mpiexec.chmod(0o700)
    run, done = launch(f"export PATH={mpiexec.parent}:$PATH")
    assert done.returncode == 0, done.stderr
    options, _, ranks = done.stdout.partition(" -n 2 ")
    assert options.startswith("--map-by :OVERSUBSCRIBE --bind-to none")
    assert ranks == f"{tmp_path}/bin/python -m mii_hpc.job.rank {run}\n"


def test_without_an_mpiexec_it_says_what_to_do(launch):
    _, done = launch("export PATH=/nowhere")
    assert done.returncode == 1
    assert "cluster='local' needs mpiexec, and there is none: pip install" in done.stderr
