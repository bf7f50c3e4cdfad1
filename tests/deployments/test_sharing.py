import grp
import os

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.lookup import SharedHome
from mii_hpc.deployments.registry import Entry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.errors import ConfigError, RegistryError

GROUP = grp.getgrgid(os.getgid()).gr_name


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def share(home, tmp_path):
    """A share named "chat", with everything that a guest needs."""
    run = RunDir.create(resolve("m", home=home, deployment_name="chat"))
    keys = credentials.create(run)
    share = sharing.Share(home, "chat", GROUP)
    share.create(run)
    entry = Entry(
        deployment_name="chat", model="m", tensor_parallel=1, replica_num=1, cluster="local",
        run_dir=run.path, submitted=1.0, heartbeat=1.0, fingerprint=keys.fingerprint,
    )  # fmt: skip
    share.publish(entry)
    return share


def test_guest_reads_entry_certificate_and_a_token_of_his_own(share, home):
    entry, keys = sharing.read(home, "chat")
    owner = credentials.load_owner(RunDir(entry.run_dir))
    assert keys.certificate == owner.certificate and keys.token not in ("", owner.token)
    assert (home.stat().st_mode & 0o777, (home / "shared").stat().st_mode & 0o777) == (0o710, 0o750)


def test_share_that_does_not_serve_yet_hides_no_other(share, home):
    waiting = home / "shared" / "another"
    waiting.mkdir(mode=0o750)
    assert [entry.deployment_name for entry in SharedHome(home).entries()] == ["chat"]


def test_what_others_could_have_written_is_not_believed(share, home):
    (home / "shared" / "chat" / "token").chmod(0o660)
    with pytest.raises(RegistryError, match="others than the owner"):
        sharing.read(home, "chat")


def test_unknown_group_is_refused(home):
    with pytest.raises(ConfigError, match=r"share='group:no-such-group': there is no such group"):
        sharing.Share(home, "chat", "no-such-group").check()


def test_home_that_the_group_cannot_reach_is_refused(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=r"cannot enter .*; .*chmod o\+x"):
        sharing.Share(closed / "home", "chat", GROUP).check()


def test_withdrawn_share_is_gone(share, home):
    sharing.withdraw(home, "chat")
    assert sharing.names(home) == []
    sharing.withdraw(home, "chat")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to a group that this user may not be in")
def test_two_groups_share_one_home(share, home):
    other = next(group for group in grp.getgrall() if group.gr_gid != os.getgid())
    run = RunDir.create(resolve("m", home=home, deployment_name="other"))
    credentials.create(run)
    sharing.Share(home, "other", other.gr_name).create(run)
    assert (home.stat().st_mode & 0o777, (home / "shared").stat().st_mode & 0o777) == (0o711, 0o755)
    assert (home / "shared" / "chat").stat().st_gid == os.getgid()
    assert (home / "shared" / "other").stat().st_gid == other.gr_gid
    RunDir.create(resolve("m", home=home, deployment_name="third"))


def test_the_entry_is_renewed_while_the_group_database_is_away(share, home, monkeypatch):
    def away(_name):
        raise KeyError

    entry, _ = sharing.read(home, "chat")
    monkeypatch.setattr(grp, "getgrnam", away)
    share.publish(entry.model_copy(update={"heartbeat": 2.0}))
    assert sharing.read(home, "chat")[0].heartbeat == 2.0
