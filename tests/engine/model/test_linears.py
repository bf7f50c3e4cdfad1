import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine.model import linears  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("rows", "shared", "way"),
    [
        (1, 64, "one shot"),
        (4, 64, "one shot"),
        (5, 64, "NCCL"),  # what is larger than the memory that the ranks share
        (1, None, "NCCL"),
    ],
)
def test_small_sums_take_one_shot_and_large_ones_nccl(monkeypatch, rows, shared, way):
    taken = []

    def one_shot(room, own, operation, group):
        taken.append("one shot")
        assert room.shape == own.shape
        assert (operation, group) == ("sum", "replica")
        return own * 2

    def all_reduce(own, group):
        taken.append("NCCL")
        own *= 2

    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_copy", one_shot)
    monkeypatch.setattr(linears.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(linears, "_resolve_process_group", str)
    own = torch.ones(1, rows, 16)
    room = None if shared is None else torch.zeros(shared)
    assert torch.equal(linears.sum_over_ranks(own, room, "replica"), own * 2)
    assert taken == [way]
    assert (own == 1).all(), "what is summed stays as it is"
