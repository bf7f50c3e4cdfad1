"""Products of few rows: on CUDA if there is one, and else in Triton's interpreter."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mii_hpc.engine.model import products  # noqa: E402
from mii_hpc.engine.model.linears import product  # noqa: E402
from tests.engine.interpreter import CUDA, DEVICE, runs_kernels  # noqa: E402

pytestmark = pytest.mark.engine

# Sizes that tiles divide, and sizes that they do not.
SHAPES = [(1, 4, 2048), (1, 6, 48), (1, 7, 4112), (2, 64, 128), (5, 70, 144), (16, 130, 256), (17, 64, 272)]
SHAPES += [(33, 70, 144), (64, 64, 272)]
SHAPES += (
    [(1, 4096, 14336), (4, 6144, 4096), (32, 28672, 4096), (9, 2880, 2880), (48, 28672, 4096), (64, 4096, 14336)]
    if CUDA
    else []
)
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
    residual = torch.randn(1, outputs, count, generator=draw).to(dtype).to(DEVICE).movedim(1, 2)
    got = products.multiply(rows[None], weight)
    expected = rows.double() @ weight.double().T
    assert got.shape == (1, count, outputs)
    assert got.dtype == dtype
    added = products.multiply(rows[None], weight, residual=residual)
    torch.testing.assert_close(added.double(), expected + residual.double(), rtol=torch.finfo(dtype).eps, atol=1e-2)
    torch.testing.assert_close(got[0].double(), expected, rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "outputs", "inputs"), [(count, 2 * outputs, size) for count, outputs, size in SHAPES]
)
def test_it_gates_what_it_multiplies(count, outputs, inputs, dtype):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(count, inputs, generator=draw).to(dtype).to(DEVICE)
    weight = (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).to(dtype).to(DEVICE)
    got = products.multiply(rows[None], weight, gated=True)
    first, second = (rows.double() @ weight.double().T).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(first) * second
    assert got.shape == (1, count, outputs // 2)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got[0].double(), expected, rtol=rounding, atol=3e-3 if dtype == torch.float16 else 3e-2)


@runs_kernels
@pytest.mark.parametrize("shape", [(1, 3, 70), (2, 4096), (0, 8)], ids=str)
def test_products_of_any_number_of_rows_are_gated(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    first, second = rows.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(first) * second
    torch.testing.assert_close(products.gate(rows).double(), expected, rtol=2e-3, atol=1e-3)


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


def test_each_program_of_a_product_that_is_summed_has_room_and_a_number():
    for count in (1, 2, 16, 17, 33, 64):
        for outputs in (64, 4096, 8192, 16384):
            tile = products.tile_of(count, outputs, 132, summed=True)
            rows = 1 if count == 1 else max(16, 1 << (count - 1).bit_length())
            assert rows * tile.outputs // 2 <= products.ROOM
            assert -(-outputs // tile.outputs) <= products.PROGRAMS
            # Threads that all read the same word would not all see it at once.
            assert rows == 1 or rows * tile.outputs // 2 >= 32 * tile.warps


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
