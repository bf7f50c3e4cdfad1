import pytest

pytest.importorskip("torch")

import torch
from torch.nn.functional import linear

from mii_hpc.engine.model.packing import PackedLinear, rounded

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_rows_gives_what_a_plain_layer_gives(bias):
    weight, added = torch.randn(24, 40), torch.randn(24) if bias else None
    packed = PackedLinear(weight, added)
    for shape in [(1,), (1, 1), (17,), (1, 33), (3, 7), (1, 300), (0,)]:
        rows = torch.randn(*shape, 40)
        assert torch.allclose(packed(rows), linear(rows, weight, added), atol=1e-5)


def test_products_are_of_few_sizes():
    """Each size is compiled once, and kept."""
    sizes = [rounded(count) for count in range(1, 513)]
    assert all(count <= size <= count * 9 / 8 for count, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 56
