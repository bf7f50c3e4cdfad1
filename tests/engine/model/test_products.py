"""Products of few rows: on CUDA if there is one, and else in Triton's interpreter."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.engine.model import products  # noqa: E402
from mii_hpc.engine.model.linears import product  # noqa: E402
from tests.engine.interpreter import CUDA, DEVICE, runs_kernels  # noqa: E402

pytestmark = pytest.mark.engine

# Sizes that tiles divide, and sizes that they do not.
SHAPES = [(1, 4, 2048), (1, 5, 48), (1, 7, 4112), (2, 64, 128), (5, 70, 144), (16, 130, 256), (17, 64, 272)]
SHAPES += [(1, 4096, 14336), (4, 6144, 4096), (32, 28672, 4096), (9, 2880, 2880)] if CUDA else []
# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "outputs", "inputs"), SHAPES)
def test_it_multiplies_few_rows(count, outputs, inputs, dtype):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, inputs, generator=draw).to(dtype).to(DEVICE)
    weight = (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).to(dtype).to(DEVICE)
    assert products.is_quick(rows, weight)
    got = products.multiply(rows[None], weight)
    expected = rows.double() @ weight.double().T
    assert got.shape == (1, count, outputs)
    assert got.dtype == dtype
    torch.testing.assert_close(got[0].double(), expected, rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)


@runs_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_it_multiplies_a_ranks_share_of_wider_rows(count):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(1, count, 96, generator=draw).half().to(DEVICE)[..., 32:80]
    weight = torch.randn(8, 48, generator=draw).half().to(DEVICE)
    expected = rows.double() @ weight.double().T
    torch.testing.assert_close(products.multiply(rows, weight).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (torch.zeros(products.MOST_ROWS + 1, 32).half(), torch.zeros(8, 32).half()),
        (torch.zeros(0, 32).half(), torch.zeros(8, 32).half()),
        (torch.zeros(1, 32), torch.zeros(8, 32)),
        (torch.zeros(1, 32), torch.zeros(8, 32).half()),
        (torch.zeros(1, 24).half(), torch.zeros(8, 24).half()),
        (torch.zeros(1, 32).half(), torch.zeros(32, 8).half().T),
    ],
    ids=["many rows", "no rows", "float32", "two dtypes", "inputs that are read slowly", "a weight that is not dense"],
)
def test_what_it_is_no_help_for_is_left_to_torch(rows, weight):
    assert not products.is_quick(rows, weight)


def test_its_tiles_fit_into_the_shared_memory_of_smaller_gpus():
    stages = {kib: products.stages_of(products.FEW_ROWS, 32, kib * 2**10) for kib in (64, 99, 163, 227)}
    assert stages == {64: 2, 99: 4, 163: 6, 227: 6}


@pytest.mark.skipif(not CUDA, reason="on CPU torch multiplies")
@pytest.mark.parametrize("count", [1, 3, 33])
def test_a_compiled_layer_multiplies_in_the_same_way(count):
    weight = torch.randn(96, 64, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(96, device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(1, count, 64, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(product, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(rows, weight, bias), product(rows, weight, bias), rtol=0.02, atol=0.1)
