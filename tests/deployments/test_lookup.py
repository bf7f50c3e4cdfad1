import grp
import os

import pytest

from mii_hpc.config import ModelConfig, resolve
from mii_hpc.deployments import credentials, lookup, sharing
from mii_hpc.deployments.lookup import OwnHome, SharedHome, free_name
from mii_hpc.deployments.registry import Entry, Registry
from mii_hpc.deployments.rundir import RunDir
from mii_hpc.deployments.sharing import Share
from mii_hpc.errors import DeploymentNotFoundError, RegistryError

GROUP = grp.getgrgid(os.getegid()).gr_name


@pytest.fixture(params=[OwnHome, SharedHome], ids=["own", "shared"])
def home(request, tmp_path):
    """One and the same home, as its owner and as a member of the group sees it."""
    return request.param(tmp_path / "home")


def deploy(home, name, model="m", tensor_parallel=1, replica_num=1):
    """Write all that there is of a deployment, shared and all, and return its entry."""
    shape = {"tensor_parallel": tensor_parallel, "replica_num": replica_num}
    run = RunDir.create(resolve(model, home=home.path, deployment_name=name, **shape))
    entry = Entry(
        deployment_name=name, model=model, **shape, cluster="local", run_dir=run.path,
        submitted=1.0, heartbeat=1.0, fingerprint=credentials.create(run).fingerprint,
    )  # fmt: skip
    Registry(home.path).claim(entry, lambda _entry: True)
    share = Share(home.path, name, GROUP)
    share.create(run)
    share.publish(entry)
    return entry


def test_what_is_found(home):
    entry = deploy(home, "chat")
    found = home.find("chat")
    seen = entry if home.is_own else entry.for_guests()
    assert (found.home, found.entry) == (home, seen)
    owner = credentials.load_owner(RunDir(entry.run_dir))
    assert found.credentials.certificate == owner.certificate
    assert (found.credentials.token == owner.token) is home.is_own, "a guest has a token of his own"
    assert home.get("chat") == found
    assert home.entries() == [seen]


def test_by_name_and_by_model(home, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    link = tmp_path / "link"
    link.symlink_to(model)
    deploy(home, "one", model="org/model")
    deploy(home, "two", model=str(link))
    assert home.find("one").entry.deployment_name == "one"
    assert home.find("org/model").entry.deployment_name == "one"
    for path in (model, link, f"{model}/", tmp_path / "link" / ".." / "model"):
        assert home.find(str(path)).entry.deployment_name == "two"


@pytest.mark.parametrize(
    "written",
    ["our-small-model", "our small model", "our/small model", "our/small model-mii-deployment", "org/m-mii-deployment"],
)
def test_a_name_as_a_deepspeed_mii_script_writes_it(home, written):
    deploy(home, "our-small-model", model="org/m")
    deploy(home, "other")
    assert home.find(written).entry.deployment_name == "our-small-model"


def test_a_name_that_deepspeed_mii_has_made_of_a_folders(home):
    deploy(home, "small", model="/models/small")
    assert home.find("small-mii-deployment").entry.deployment_name == "small"


def test_its_own_configuration(home):
    entry = deploy(home, "chat", tensor_parallel=2, replica_num=3)
    assert home.get("chat").config.port_number == 0
    Registry(home.path).publish(entry.model_copy(update={"address": "10.0.0.1:4711"}))
    Share(home.path, "chat", GROUP).publish(Registry(home.path).get("chat"))
    config = home.find("m").config
    assert (config.deployment_name, config.home, config.port_number) == ("chat", home.path, 4711)
    assert config.model_conf == ModelConfig(model_name_or_path="m", tensor_parallel=2, replica_num=3)


def test_the_name_comes_before_the_model(home):
    deploy(home, "gpt2", model="other")
    deploy(home, "mine", model="gpt2")
    assert home.find("gpt2").entry.deployment_name == "gpt2"


def test_an_ambiguous_model_is_answered_with_the_names(home):
    deploy(home, "one")
    deploy(home, "two")
    with pytest.raises(DeploymentNotFoundError, match=r"'m' is served by several .*: 'one', 'two'$"):
        home.find("m")


def test_what_is_not_there_is_answered_with_what_is(home):
    with pytest.raises(DeploymentNotFoundError, match=r"there: none$"):
        OwnHome(home.path).find("chat")
    deploy(home, "one")
    with pytest.raises(DeploymentNotFoundError, match=r"'chat' in .*; there: 'one' \(m\)$"):
        home.find("chat")
    with pytest.raises(DeploymentNotFoundError, match="'chat'") as failure:
        home.get("chat")
    assert failure.value.deployment_name == "chat"


def test_a_certificate_that_the_registry_does_not_name_is_not_believed(home):
    entry = deploy(home, "chat")
    credentials.create(RunDir(entry.run_dir))
    (home.path / "shared" / "chat" / "tls.crt").write_bytes(RunDir(entry.run_dir).tls_certificate.read_bytes())
    with pytest.raises(RegistryError, match=r"^deployment 'chat': its certificate is not the one in the registry$"):
        home.find("chat")


def test_homes_are_looked_into_in_their_order(tmp_path):
    mine, theirs = OwnHome(tmp_path / "mine"), SharedHome(tmp_path / "theirs")
    with pytest.raises(DeploymentNotFoundError, match=r"in .*mine; there: none; no deployment .*in .*theirs; there"):
        lookup.find("chat", [mine, theirs])
    deploy(theirs, "chat")
    assert lookup.find("chat", [mine, theirs]).home is theirs
    deploy(mine, "chat")
    assert lookup.find("chat", [mine, theirs]).home is mine


def test_a_run_gives_back_its_name_and_what_it_shares(home):
    entry = deploy(home, "chat")
    free_name(home.path, entry.model_copy(update={"run_dir": home.path / "runs" / "another"}))
    assert home.get("chat").entry.fingerprint == entry.fingerprint
    free_name(home.path, entry)
    with pytest.raises(DeploymentNotFoundError):
        home.get("chat")
    assert Registry(home.path).get("chat") is None
    assert sharing.names(home.path) == []
    free_name(home.path, entry)


def test_the_dead_do_not_count(home):
    """A name that is asked for is found whatever its state: whether it lives is another question."""
    deploy(home, "dead")
    deploy(home, "live")
    assert home.find("m", lambda entry: entry.deployment_name == "live").entry.deployment_name == "live"
    assert home.find("dead", lambda entry: False).entry.deployment_name == "dead"
    with pytest.raises(DeploymentNotFoundError, match="several"):
        home.find("m")
