import errno
import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest

from mii_hpc.deployments.registry import STALE_SECONDS, TEXT_LENGTH, Entry, Registry, heartbeat_is_fresh
from mii_hpc.errors import DeploymentExistsError, DeploymentNotFoundError, RegistryError
from tests.waiting import PATIENCE, eventually


def entry(name="chat", run="/runs/a", **fields):
    now = time.time()
    given = {"model": "m", "tensor_parallel": 1, "replica_num": 1, "cluster": "local", "job_id": "7"}
    return Entry(
        deployment_name=name, run_dir=run, **{**given, "submitted": now, "heartbeat": now, "detail": "", **fields}
    )


def live(_entry):
    return True


def stale(_entry):
    return False


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home")


def test_claim_publish_get_withdraw(registry):
    assert registry.get("chat") is None
    assert registry.entries() == []
    registry.claim(entry(), live)
    registry.publish(entry(state="ready"))
    assert registry.get("chat").state == "ready"
    registry.withdraw(entry())
    assert registry.get("chat") is None
    registry.withdraw(entry())
    assert list(registry.folder.iterdir()) == [], "nothing is left aside"


def test_entries_and_folder_are_private(registry):
    registry.claim(entry(), live)
    assert registry.folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in registry.folder.iterdir()] == [0o600]


def test_a_live_name_is_refused_and_says_by_whom(registry):
    registry.claim(entry(state="ready"), live)
    with pytest.raises(
        DeploymentExistsError, match=r"^deployment_name='chat': taken by job 7, which is ready;"
    ) as taken:
        registry.claim(entry(run="/runs/b"), live)
    assert taken.value.deployment_name == "chat"
    assert str(registry.get("chat").run_dir) == "/runs/a"


def test_a_stale_entry_is_replaced(registry):
    registry.claim(entry(), live)
    registry.claim(entry(run="/runs/b"), stale)
    assert str(registry.get("chat").run_dir) == "/runs/b"


def test_a_repeated_claim_of_one_run_succeeds(registry):
    registry.claim(entry(), live)
    registry.claim(entry(), live)


@pytest.mark.parametrize("left_over", [False, True], ids=["free name", "stale entry"])
def test_of_many_claimants_exactly_one_wins(registry, left_over):
    for attempt in range(6):
        name = f"chat-{attempt}"
        if left_over:
            registry.claim(entry(name, "/runs/old"), live)
        start = threading.Barrier(16, timeout=PATIENCE)
        won, lost = [], []

        def claim(number, name=name, start=start, won=won, lost=lost):
            mine = entry(name, f"/runs/{number}")
            start.wait()
            try:
                registry.claim(mine, lambda holder: str(holder.run_dir) != "/runs/old")
                won.append(mine.run_dir)
            except DeploymentExistsError as error:
                lost.append(error)

        threads = [threading.Thread(target=claim, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert (len(won), len(lost)) == (1, 15)
        assert registry.get(name).run_dir == won[0]


def test_a_run_withdraws_only_its_own_entry(registry):
    registry.claim(entry(run="/runs/b"), live)
    registry.withdraw(entry(run="/runs/a"))
    assert registry.get("chat") is not None


def test_withdrawing_does_not_remove_what_was_claimed_meanwhile(registry, monkeypatch):
    """The entry of a dead run is found, but replaced by somebody else before it is removed."""
    registry.claim(entry(run="/runs/dead"), live)
    real = os.link

    def claimed_just_before(source, target):
        monkeypatch.setattr(os, "link", real)
        registry.withdraw(entry(run="/runs/dead"))
        registry.claim(entry(run="/runs/new"), live)
        real(source, target)

    monkeypatch.setattr(os, "link", claimed_just_before)
    registry.withdraw(entry(run="/runs/dead"))
    assert str(registry.get("chat").run_dir) == "/runs/new"
    assert len(list(registry.folder.iterdir())) == 1


def test_a_deployment_that_lost_its_name_does_not_take_it_back(registry):
    registry.claim(entry(), live)
    registry.withdraw(entry())
    with pytest.raises(DeploymentNotFoundError) as withdrawn:
        registry.publish(entry())
    registry.claim(entry(run="/runs/b"), live)
    with pytest.raises(DeploymentExistsError) as taken:
        registry.publish(entry())
    assert withdrawn.value.deployment_name == taken.value.deployment_name == "chat"


def test_half_written_entries_are_never_seen(registry):
    registry.claim(entry(detail="x" * TEXT_LENGTH), live)
    stop = threading.Event()

    def rewrite():
        for letter in itertools.cycle("abcdefghij"):
            registry.publish(entry(detail=letter * TEXT_LENGTH))
            if stop.is_set():
                return

    def looked():
        found = registry.get("chat")
        assert len(found.detail) == TEXT_LENGTH
        assert len(set(found.detail)) == 1
        assert [e.deployment_name for e in registry.entries()] == ["chat"]
        seen.append(found.detail[0])
        return len(seen) >= 200 and len(set(seen)) > 2

    writer = threading.Thread(target=rewrite)
    writer.start()
    seen = []
    try:
        eventually(looked, pause=0)
    finally:
        stop.set()
        writer.join(PATIENCE)


def everything(registry):
    yield lambda: registry.claim(entry(), live)
    yield lambda: registry.get("chat")
    yield registry.entries


def test_a_folder_open_to_others_is_refused_with_the_remedy(registry):
    registry.claim(entry(), live)
    registry.folder.chmod(0o777)
    for act in everything(registry):
        with pytest.raises(
            RegistryError, match=rf"mode 0777 gives others access; correct it with: chmod 700 {registry.folder}"
        ):
            act()


def test_a_folder_of_somebody_else_is_refused(registry, monkeypatch):
    registry.claim(entry(), live)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for act in everything(registry):
        with pytest.raises(
            RegistryError, match=rf"belongs to user id {os.getuid()}, .*\(user id 12345\).*MII_HPC_HOME"
        ):
            act()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match=r"cannot be made: Not a directory"):
        Registry(tmp_path / "file").claim(entry(), live)


def test_what_is_no_entry_is_refused_by_its_path(registry):
    registry.claim(entry(), live)
    path = registry.folder / "chat.json"
    path.write_text("{}")
    with pytest.raises(RegistryError, match=f"^{path}: not an entry"):
        registry.get("chat")


def test_an_entry_that_is_none_hides_no_other(registry, caplog):
    registry.claim(entry(), live)
    registry.claim(entry("other"), live)
    (registry.folder / "chat.json").write_text('{"deployment_name": "chat\\u001b[2J"}')
    assert [each.deployment_name for each in registry.entries()] == ["other"]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{registry.folder}/chat.json: not an entry of the registry: deployment_name")


HUGE = "1" + "0" * 5000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job_id", "--user=root"),
        ("job_id", "-1"),
        ("deployment_name", "../../chat"),
        ("address", "unix:/tmp/x:1"),
        ("gateway", "http://h:1/$(touch x)"),
        ("fingerprint", "\n"),
        ("tensor_parallel", HUGE),
        ("replica_num", 0),
        ("heartbeat", float("nan")),
        ("ends", 1e300),
    ],
)
def test_an_entry_with_what_no_deployment_writes_is_none(tmp_path, field, value):
    told = {**json.loads(entry().model_dump_json()), field: "HERE"}
    text = json.dumps(told).replace('"HERE"', value if value == HUGE else json.dumps(value))
    with pytest.raises(RegistryError) as refused:
        Entry.parse(text.encode(), tmp_path / "chat.json")
    assert str(refused.value).startswith(f"{tmp_path}/chat.json: not an entry") and "\n" not in str(refused.value)


def test_what_an_entry_tells_can_be_shown_on_a_terminal(tmp_path):
    told = Entry.parse(entry(detail="\x1b]0;x\x07 ü", model="a\u202eb").model_dump_json().encode(), tmp_path)
    assert (told.detail, told.model) == ("\\x1b]0;x\\x07 ü", "a\\u202eb")


def test_entries_of_newer_versions_can_be_read():
    text = entry().model_dump_json().replace('"detail"', '"a_new_field":1,"detail"')
    assert Entry.model_validate_json(text).deployment_name == "chat"


def test_heartbeats():
    now = time.time()
    assert heartbeat_is_fresh(entry(heartbeat=now))
    assert not heartbeat_is_fresh(entry(heartbeat=now - STALE_SECONDS - 1))


def test_a_stale_entry_whose_job_is_slow_to_ask_for_is_replaced(registry, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(_entry):
        now[0] += 30
        return False

    registry.claim(entry(), live)
    registry.claim(entry(run="/runs/b"), slow)
    assert str(registry.get("chat").run_dir) == "/runs/b"


def test_a_file_that_nfs_calls_stale_is_read_again(registry, monkeypatch):
    registry.claim(entry(), live)
    real, stale = os.open, [True, True]

    def opened(path, *flags):
        if stale:
            stale.pop()
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *flags)

    monkeypatch.setattr(os, "open", opened)
    assert registry.get("chat") is not None and not stale


def test_a_home_that_cannot_be_entered_is_refused_in_a_sentence(registry, monkeypatch):
    real = Path.stat

    def stat(path, **options):
        if path == registry.folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    for act in (lambda: registry.get("chat"), registry.entries):
        with pytest.raises(RegistryError, match=r"cannot be read: Permission denied; choose another home"):
            act()
