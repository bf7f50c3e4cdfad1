"""What products and sums take of a layer's graph, by torch.compile around plain operators."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine import compiled, fusing  # noqa: E402
from mii_hpc.engine.model.linears import Linear, MergedLinear, Part  # noqa: E402

pytestmark = pytest.mark.engine


SILU = torch.nn.functional.silu


def compile_and_compare(monkeypatch, compute, *rows):
    """Compile a function of rows with fused kernels, and compare what it computes; return the graphs' nodes of ours."""
    graphs = []

    def backend(graph, inputs):
        fusing.fuse(graph)
        graphs.append([node for node in graph.graph.nodes if "mii_hpc" in str(node.target)])
        return graph.forward

    monkeypatch.setattr(compiled, "_backend", backend)
    torch._dynamo.reset()
    function = compiled._compile(compute)
    for each in rows:
        before = each.clone()
        torch.testing.assert_close(function(each), compute(each), rtol=4e-3, atol=4e-3)
        assert torch.equal(each, before)
    return graphs


@pytest.fixture
def group():
    """The name of a group of this process alone."""
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD.group_name
    distributed.destroy_process_group()


@pytest.mark.parametrize("in_product", [False, True], ids=["after the product", "in the product"])
@pytest.mark.parametrize(
    ("compute", "sums"),
    [
        (lambda rows, first, second: (lambda middle: middle + second(middle))(rows + first(rows)), 2),
        (lambda rows, first, second: first(rows) + rows, 1),
        (lambda rows, first, second: first(rows) + rows[:, :1], 0),
        (lambda rows, first, second: first(rows) + rows.double(), 0),
        (lambda rows, first, second: first(rows) + 1.0, 0),
        (lambda rows, first, second: (lambda output: (output + rows) * output)(first(rows)), 0),
        (lambda rows, first, second: (lambda output: output + output)(first(rows)), 0),
        (lambda rows, first, second: torch.relu(first(rows)) + rows, 0),
        (lambda rows, first, second: first(rows) + torch.relu(rows), 0),
    ],
)
def test_what_is_added_to_a_sum_over_ranks_alone_is_added_in_it(monkeypatch, group, compute, sums, in_product):
    layers = [Linear(torch.nn.Parameter(torch.randn(6, 6), requires_grad=False), None, group) for _ in range(2)]
    for layer in layers:
        layer.peers, layer.sums_in_product = SimpleNamespace(addresses=None, counts=None), in_product
    rows = [torch.randn(count, 6) for count in (1, 3, 4)]
    graphs = compile_and_compare(monkeypatch, lambda rows: compute(rows, *layers), *rows)
    for graph in graphs:
        assert sum("residual" in node.kwargs for node in graph) == sums
        assert any("sum_over_ranks" in str(node.target) for node in graph) != in_product
        assert any("group" in node.kwargs for node in graph) == in_product


@pytest.mark.parametrize(
    ("compute", "dtype", "added"),
    [
        (lambda rows, layer: rows + layer(rows), torch.float16, True),
        (lambda rows, layer: layer(rows) + rows, torch.float16, True),
        (lambda rows, layer: layer(rows) + rows, torch.float32, False),
        (lambda rows, layer: (rows + layer(rows)) * 2, torch.float16, False),
        (lambda rows, layer: (lambda made: (made + rows, made))(layer(rows)), torch.float16, False),
    ],
)
def test_the_last_product_of_a_layer_adds_its_residual(monkeypatch, compute, dtype, added):
    layer = Linear(torch.nn.Parameter(torch.randn(16, 16, dtype=dtype), requires_grad=False), None)
    rows = [torch.randn(1, count, 16, dtype=dtype) for count in (1, 3, 4)]
    for graph in compile_and_compare(monkeypatch, lambda rows: compute(rows, layer), *rows):
        assert [list(node.kwargs) for node in graph] == [["residual"] if added else []]


def test_what_is_changed_in_place_stays(monkeypatch):
    def compute(rows, gate, other):
        mask = torch.zeros_like(rows)
        mask.scatter_(-1, torch.zeros(rows.shape[:-1], dtype=torch.long)[..., None], 1.0)
        rows = rows * mask
        return SILU(gate(rows)) * other(rows)

    parts = gate_and_other()
    (graph,) = compile_and_compare(monkeypatch, lambda rows: compute(rows, *parts), torch.ones(1, 3, 16).half())
    assert [node.kwargs for node in graph] == [{"gated": True}]


def gate_and_other(dtype=torch.float16, bias=False, outputs=(8, 8)):
    """Two layers of a gated network that are merged."""
    layers = [torch.nn.Linear(16, size, bias=bias, dtype=dtype).requires_grad_(False) for size in outputs]
    merged = MergedLinear(layers)
    return [Part(merged, number) for number in range(2)]


@pytest.mark.parametrize(
    ("compute", "parts", "gated"),
    [
        (lambda rows, gate, other: SILU(gate(rows)) * other(rows), {}, True),
        (lambda rows, gate, other: SILU(gate(rows)) * other(rows), {"dtype": torch.float32}, False),
        (lambda rows, gate, other: SILU(gate(rows)) * other(rows), {"bias": True}, False),
        (lambda rows, gate, other: torch.relu(gate(rows)) * other(rows), {}, False),
        (lambda rows, gate, other: SILU(gate(rows)) + other(rows), {}, False),
        (lambda rows, gate, other: SILU(gate(rows)) * other(rows)[..., :1], {}, False),
        (lambda rows, gate, other: (lambda first, second: first * SILU(second))(gate(rows), other(rows)), {}, False),
        (lambda rows, gate, other: (lambda first, second: SILU(second) * first)(gate(rows), other(rows)), {}, False),
        (lambda rows, gate, other: (lambda one, two: SILU(one) * two + one)(gate(rows), other(rows)), {}, False),
        (lambda rows, gate, other: (lambda one, two: SILU(one) * two + two)(gate(rows), other(rows)), {}, False),
        (lambda rows, gate, other: (lambda one, two: one * two + one)(SILU(gate(rows)), other(rows)), {}, False),
        (lambda rows, gate, other: SILU(gate(rows)) * other(rows), {"outputs": (8, 1)}, False),
        (lambda rows, gate, other: SILU(gate(rows)) * 2 * other(rows), {}, False),
        (lambda rows, gate, other: 2 * SILU(gate(rows)), {}, False),
    ],
)
def test_a_product_is_gated_where_nothing_else_is_made_of_it(monkeypatch, compute, parts, gated):
    gate, other = gate_and_other(**parts)
    rows = [torch.randn(1, count, 16, dtype=parts.get("dtype", torch.float16)) for count in (1, 3, 4)]
    graphs = compile_and_compare(monkeypatch, lambda rows: compute(rows, gate, other), *rows)
    for graph in graphs:
        assert [node.kwargs for node in graph] == [{"gated": True} if gated else {}]
