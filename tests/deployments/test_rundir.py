import os

import pytest

from mii_hpc.config import resolve
from mii_hpc.deployments.rundir import Failure, RunDir
from mii_hpc.errors import RegistryError


@pytest.fixture
def config(tmp_path):
    return resolve("m", deployment_name="chat", tensor_parallel=2, home=tmp_path / "home")


@pytest.fixture
def run(config):
    return RunDir.create(config)


def test_everything_in_it_is_private_whatever_the_umask(config):
    before = os.umask(0)
    try:
        run = RunDir.create(config)
        run.write_failure(Failure(0, "node", "it broke", ""))
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in config.home.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


def test_runs_of_one_name_are_apart(config, run):
    other = RunDir.create(config)
    assert other.path != run.path
    assert other.path.parent == run.path.parent == config.home / "runs"
    assert run.path.name.startswith("chat-")


def test_the_configuration_is_kept(config, run):
    assert run.load_config() == config


def test_a_tokenizer_is_kept_and_found_by_its_path(tmp_path):
    class Tokenizer:
        def __call__(self, text): ...

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    class Wrapper:  # as DeepSpeed-MII's HFTokenizer
        tokenizer = Tokenizer()

    for given in (Tokenizer(), Wrapper()):
        run = RunDir.create(resolve("m", tokenizer=given, home=tmp_path / "home"))
        assert run.load_config().model_conf.tokenizer == str(run.path / "tokenizer")
        assert (run.path / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_a_directory_open_to_others_is_not_trusted(run):
    run.path.chmod(0o750)
    with pytest.raises(RegistryError, match=f"mode 0750 gives others access; correct it with: chmod 700 {run.path}"):
        run.load_config()


def test_a_home_of_somebody_else_is_refused(config, monkeypatch):
    config.home.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RegistryError, match="belongs to user id"):
        RunDir.create(config)


def test_the_first_failure_counts(run):
    assert run.read_failure() is None
    for number, rank in enumerate((3, 1)):
        run.write_failure(Failure(rank, "node", f"failure {number}", "Traceback"))
        os.utime(run.failures / f"{rank}.json", ns=(number, number))
    assert run.read_failure() == Failure(3, "node", "failure 0", "Traceback")


def test_the_likeliest_last_words_come_first(run):
    for age, path in enumerate(
        (run.submitit / "1_0_log.out", run.submitit / "1_1_log.out", run.rank_log(0), run.engine_log(0))
    ):
        path.write_text("x")
        os.utime(path, (age, age))
    names = [path.name for path in run.outputs()]
    assert names == ["1_1_log.out", "1_0_log.out", "engine-0.log", "rank-0.log"]
