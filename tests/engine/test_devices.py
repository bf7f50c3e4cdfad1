from dataclasses import replace
from socket import gethostname

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.devices import choose_device, gpus_given, ranks_per_device, room_on
from mii_hpc.engine.distributed import refuse_mixture
from mii_hpc.errors import ConfigError

JOB = {"SLURM_JOB_ID": "7"}


def spec(device="auto", **place):
    return replace(EngineSpec.alone(ModelConfig(model_name_or_path="m", device=device)), **place)


@pytest.fixture
def host(monkeypatch):
    """Make this host one with so many GPUs that torch can use, and so many that Slurm has given to the job."""

    def make(usable, given=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setenv("DS_ACCELERATOR", "")
        for name in ("SLURM_JOB_ID", "SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
            monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv("SLURM_JOB_ID", "7")
            monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(given))

    return make


@pytest.mark.parametrize(
    ("environment", "given"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "4"}, None),  # left over from elsewhere
        (JOB, 0),
        ({**JOB, "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_GPUS": "0,1"}, 4),
        ({**JOB, "SLURM_JOB_GPUS": "0,1"}, 2),
        ({**JOB, "SLURM_STEP_GPUS": "3", "SLURM_JOB_GPUS": "2,3"}, 1),
    ],
)
def test_what_slurm_has_given(environment, given):
    assert gpus_given(environment) == given


@pytest.mark.parametrize(
    ("device", "usable", "given", "chosen"),
    [
        ("auto", 0, None, "cpu"),
        ("auto", 0, 0, "cpu"),
        ("cpu", 0, 2, "cpu"),
        ("cpu", 2, 2, "cpu"),
        ("auto", 2, None, "cuda:1"),
        ("auto", 2, 2, "cuda:1"),
        ("cuda", 2, None, "cuda:1"),
        ("auto", 1, 2, "cuda:0"),  # --gpus-per-task
    ],
)
def test_the_device_of_a_rank(host, device, usable, given, chosen):
    host(usable, given)
    said = []
    assert choose_device(spec(device, local_rank=1, local_world_size=2), said.append) == torch.device(chosen)
    assert said == []


@pytest.mark.parametrize(
    ("device", "given", "sentence"),
    [
        (
            "auto",
            2,
            r"^device='auto': Slurm has given this job 2 GPU\(s\) on HOST, but torch finds none that it can use",
        ),
        (
            "cuda",
            2,
            r"^device='cuda': Slurm has given this job 2 GPU\(s\) on HOST, but torch finds none that it can use",
        ),
        (
            "cuda",
            None,
            r"^device='cuda': torch finds none that it can use on HOST: .+; to serve on CPUs set device='cpu'$",
        ),
        ("cuda", 0, r"^device='cuda': torch finds none that it can use on HOST: "),
    ],
)
def test_a_rank_without_the_gpu_that_it_is_to_have_says_so(host, device, given, sentence):
    host(0, given)
    with pytest.raises(ConfigError, match=sentence.replace("HOST", gethostname())):
        choose_device(spec(device), lambda sentence: None)


def test_a_rank_that_finds_a_gpu_which_the_job_has_not_says_so(host):
    host(2, 0)
    said = []
    assert choose_device(spec(), said.append) == torch.device("cuda", 0)
    assert said == [f"Slurm has given this job no GPU on {gethostname()}; taking cuda:0 all the same"]


def test_the_ranks_of_a_replica_share_no_gpu(host):
    host(1, 1)
    with pytest.raises(
        ConfigError, match=r"^tensor_parallel=2: the ranks of a replica take a GPU each, and on \S+ there"
    ):
        choose_device(spec(world_size=2, replica_local_size=2, local_world_size=2), lambda sentence: None)


@pytest.mark.parametrize(
    ("ranks", "visible", "given", "sharing"),
    [
        (4, 4, None, [1, 1, 1, 1]),  # all ranks see all devices
        (8, 4, 4, [2] * 8),
        (3, 2, 2, [2, 1, 2]),
        (2, 4, 4, [1, 1]),
        (2, 1, None, [2, 2]),  # two replicas on the one device of this machine
        (4, 1, 4, [1] * 4),  # --gpus-per-task: each sees its own
        (4, 1, 2, [2] * 4),
        (4, 1, 0, [4] * 4),
        (1, 8, 1, [1]),
    ],
)
def test_ranks_that_share_a_device_are_counted(ranks, visible, given, sharing):
    environment = {} if given is None else {**JOB, "SLURM_GPUS_ON_NODE": str(given)}
    specs = [spec(local_rank=rank, local_world_size=ranks) for rank in range(ranks)]
    assert [ranks_per_device(each, visible, environment) for each in specs] == sharing


def test_a_replica_of_ranks_with_and_without_a_gpu_is_refused():
    store = HashStore()
    replica = {"world_size": 2, "replica_local_size": 1}
    store.set("device/1", "cpu on n2")
    refuse_mixture(store, spec(**replica), torch.device("cpu"))
    with pytest.raises(ConfigError, match=rf"^device='auto': .* compute on cuda on {gethostname()}, cpu on n2; choose"):
        refuse_mixture(store, spec(**replica), torch.device("cuda", 0))


def test_no_room_on_the_device_is_said_with_what_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    with (
        pytest.raises(ConfigError, match=r"cuda:1 on .* has no room for this rank: of its 80.0 GiB 1.0 are free"),
        room_on(torch.device("cuda", 1)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
