"""Linear layers of which each rank has a share, on a CPU; those of a GPU are the same but for the kernels."""

import pytest

torch = pytest.importorskip("torch")
from torch import distributed, nn  # noqa: E402

from mii_hpc.engine.model.linears import GatheredLinear, Linear, gather_head, share_memory  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

INPUTS = (5, 0, 3)
"""Of each rank. DeepSpeed gives some ranks nothing of a small head."""
OUTPUTS = 7
SECONDS = 240


class Model(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.inner = nn.Module()
        self.inner.head = head

    def get_output_embeddings(self):
        return self.inner.head


def whole():
    draw = torch.Generator().manual_seed(0)
    sizes = ((OUTPUTS, sum(INPUTS)), (OUTPUTS,), (2, 4, sum(INPUTS)))
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]


def compute_as_rank(rank, store, results):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(store, len(INPUTS)), rank=rank, world_size=len(INPUTS)
    )
    weight, bias, rows = whole()
    first = sum(INPUTS[:rank])
    inputs = slice(first, first + INPUTS[rank])
    for one in (bias, None):
        parameters = [
            None if part is None else nn.Parameter(part, requires_grad=False) for part in (weight[:, inputs], one)
        ]
        model = Model(Linear(*parameters, distributed.group.WORLD.group_name, inputs))
        sums = model.inner.head(rows)
        gather_head(model)
        head = model.get_output_embeddings()
        results.put((rank, type(head) is GatheredLinear, head.weight.shape[0], sums.tolist(), head(rows).tolist()))
    distributed.barrier()
    distributed.destroy_process_group()


def test_a_head_gives_the_same_when_each_rank_has_some_outputs_instead_of_inputs(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=compute_as_rank, args=(rank, str(tmp_path / "store"), results), daemon=True)
        for rank in range(len(INPUTS))
    ]
    for process in ranks:
        process.start()
    seen = [results.get(timeout=SECONDS) for _ in range(2 * len(ranks))]
    for process in ranks:
        process.join(SECONDS)
    weight, bias, rows = whole()
    for rank in range(len(ranks)):
        for added, (_, gathered, share, sums, outputs) in zip(
            (bias, 0), [one for one in seen if one[0] == rank], strict=True
        ):
            assert gathered
            assert share == 3
            for got in (sums, outputs):
                torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), rows @ weight.T + added)


@pytest.mark.parametrize(
    ("dtype", "inputs", "agreed", "in_product"),
    [
        (torch.float16, 32, [True, True, True], True),
        (torch.float16, 32, [True, True, False], False),  # another rank's share is not read quickly
        (torch.float32, 32, [True, True, True], False),
        (torch.float16, 24, [True, True, True], False),
        (torch.float16, 0, [True, True, True], False),
        (torch.float16, 32, [True, False], None),
        (torch.float16, 32, [False], None),
    ],
)
def test_products_are_summed_in_their_kernels_where_all_ranks_can(monkeypatch, dtype, inputs, agreed, in_product):
    peers = pytest.importorskip("mii_hpc.engine.model.peers")
    shared, others = object(), iter(agreed)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(peers, "room", lambda ranks, device: torch.zeros(1))
    monkeypatch.setattr(peers.Peers, "meet", lambda memory, group: shared)

    def layer(inputs, group):
        return Linear(nn.Parameter(torch.zeros(8, inputs, dtype=dtype), requires_grad=False), None, group)

    module = nn.ModuleList([layer(64, "all"), layer(inputs, "all"), layer(24, None)])
    share_memory(module, torch.device("cpu"), lambda mine: next(others) and mine)
    assert [part.peers for part in module] == [None if in_product is None else shared] * 3
    assert [part.sums_in_product for part in module] == [bool(in_product)] * 2 + [False]
    assert list(others) == []
