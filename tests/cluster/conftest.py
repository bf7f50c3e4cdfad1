import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lacking import lacking
from tests.waiting import PATIENCE

from .cluster import Cluster, missing

GUEST = "mii-guest"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm cluster, which this process's environment points to."""
    if reason := missing():
        lacking(reason)
    # Not pytest's temporary folder: other users cannot enter that one.
    folder = Path(tempfile.mkdtemp(prefix="mii-cluster-"))
    with pytest.MonkeyPatch.context() as patch:
        with Cluster(folder) as running:
            for name, value in running.env.items():
                patch.setenv(name, value)
            yield running
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def second_user(cluster: Cluster) -> Iterator[str]:
    """The name of an ordinary user of the cluster."""
    try:
        pwd.getpwnam(GUEST)
    except KeyError:
        subprocess.run(["useradd", "--create-home", GUEST], check=True, timeout=PATIENCE)
    yield GUEST
    subprocess.run(["userdel", "--remove", "--force", GUEST], check=True, capture_output=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def shared(cluster: Cluster) -> Iterator[Path]:
    """A folder that all nodes see, as on a shared filesystem, and that every user can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="mii-shared-"))
    folder.chmod(0o711)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(folder)
        yield folder
    cluster.reset()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def home(shared: Path) -> Path:
    """The home of registry and run directories."""
    return shared / "home"
