import contextlib
import grp
import json
import os
import shutil
import socket

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments import credentials, sharing
from mii_hpc.deployments.files import open_to_group
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
    share.run = run
    return share


def test_guest_reads_entry_certificate_and_a_token_of_his_own(share, home):
    _, keys = sharing.read(home, "chat")
    owner = credentials.load_owner(share.run)
    assert keys.certificate == owner.certificate and keys.token not in ("", owner.token)
    assert keys.identity == share.run.guest_identity.read_bytes() != owner.identity
    assert (home.stat().st_mode & 0o777, (home / "shared").stat().st_mode & 0o777) == (0o710, 0o750)


def test_share_that_does_not_serve_yet_hides_no_other(share, home):
    waiting = home / "shared" / "another"
    waiting.mkdir(mode=0o750)
    assert [entry.deployment_name for entry in SharedHome(home).entries()] == ["chat"]


def test_what_others_could_have_written_is_not_believed(share, home):
    (home / "shared" / "chat" / "token").chmod(0o660)
    with pytest.raises(RegistryError, match="others than user id"):
        sharing.read(home, "chat")


def test_nothing_for_commands_or_paths_comes_from_another_user(share, home):
    path = home / "shared" / "chat" / "entry.json"
    told = json.loads(path.read_text())
    assert not {"4711", str(share.run.path)} & set(told.values()), "its owner does not write it"
    path.write_text(json.dumps({**told, "job_id": "4711", "job_host": "login1", "run_dir": "/proc/self/root"}))
    entry, _ = sharing.read(home, "chat")
    assert (entry.job_id, entry.job_host, str(entry.run_dir)) == ("", "", "/dev/null/not-for-guests")
    (found,) = SharedHome(home).entries()
    assert found == entry
    path.write_text(json.dumps({**told, "deployment_name": "other"}))
    with pytest.raises(RegistryError, match="is the entry of 'other'; it is not believed"):
        sharing.read(home, "chat")


@pytest.mark.parametrize("name", ["entry.json", "tls.crt", "client.pem", "token"])
@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "endless", "broken", "socket"])
def test_a_hostile_file_is_refused_at_once_and_hides_no_other(share, home, caplog, name, kind):
    shutil.copytree(home / "shared" / "chat", other := home / "shared" / "other")
    told = (other / "entry.json").read_text()
    (other / "entry.json").write_text(told.replace('"chat"', '"other"'))
    path = home / "shared" / "chat" / name
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path, 0o640)
        case "link":
            path.symlink_to(os.devnull)
        case "folder":
            path.mkdir()
        case "endless":
            path.touch(0o600)
            os.truncate(path, 2**40)
        case "broken":
            path.write_bytes(b"\xff\x1b[2J")
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(path.parent):
                bound.bind(name)
            path.chmod(0o600)
    with pytest.raises(RegistryError, match=f"^{path.parent}") as refused:
        sharing.read(home, "chat")
    assert str(refused.value).isprintable()
    assert [entry.deployment_name for entry in SharedHome(home).entries()] == ["other"]
    assert len(caplog.records) == 1


def test_a_link_of_another_user_is_no_home_to_share(tmp_path):
    """He chooses where it leads: to a folder of ours that is private."""
    private = tmp_path / "ssh"
    private.mkdir(mode=0o700)
    theirs = tmp_path / "link"
    theirs.symlink_to(private)
    if os.geteuid():
        pytest.skip("only root can make a link that is another's")
    os.chown(theirs, 12345, 12345, follow_symlinks=False)
    for home in (theirs, theirs / "below"):
        with pytest.raises(RegistryError, match=f"^{theirs}: is a link that belongs to user id 12345"):
            RunDir.create(resolve("m", home=home, deployment_name="chat"))
        with pytest.raises(RegistryError, match=f"^{theirs}: is a link"):
            open_to_group(home, os.getgid(), 0o710)
    assert private.stat().st_mode & 0o777 == 0o700 and not list(private.iterdir())


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
