import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from mii_hpc.engine import extensions  # noqa: E402
from mii_hpc.engine.attention import cpu as decode  # noqa: E402
from tests.lacking import lacking  # noqa: E402

pytestmark = pytest.mark.engine
PAGE = 8


# A processor with AVX-512 runs what is made for those without, too.
CAPABILITIES = {"AVX512": ["AVX512", "AVX2"]}.get(torch.backends.cpu.get_cpu_capability(), ["its own"])


@pytest.fixture(scope="module", params=CAPABILITIES)
def kernels(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "its own":
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
        found = {dtype: decode.compile_kernel(dtype) for dtype in decode.FUNCTIONS}
    if None in found.values():
        lacking("there is no compiler")
    return found


def whole(cache, table, length):
    """The tokens of one sequence, [1, heads, tokens, size], in double precision."""
    return cache[table].flatten(0, 1)[:length].transpose(0, 1)[None].double()


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 6), (6, 3), (8, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_it_attends_as_torch_does(kernels, dtype, tolerance, heads, key_heads, window):
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(40, PAGE, key_heads, 20, generator=draw).to(dtype)
    values = torch.randn(40, PAGE, key_heads, 33, generator=draw).to(dtype)
    tables = torch.randperm(40, generator=draw).view(8, 5)
    lengths = torch.tensor([1, 2, 8, 9, 17, 31, 32, 40])
    query = torch.randn(heads, 8, 20, generator=draw).to(dtype).transpose(0, 1)
    output = torch.empty(8, heads, 33, dtype=dtype)
    kernels[dtype](query, keys, values, output, tables, lengths, 0.3, window)
    for row, (table, length) in enumerate(zip(tables, lengths.tolist(), strict=True)):
        first = max(0, length - (window or length))
        key, value = whole(keys, table, length)[:, :, first:], whole(values, table, length)[:, :, first:]
        one = query[row][None, :, None].double()
        expected = scaled_dot_product_attention(one, key, value, scale=0.3, enable_gqa=True)
        assert torch.allclose(output[row].double(), expected[0, :, 0], atol=tolerance)


def test_what_is_not_a_number_stays_with_its_sequence(kernels):
    keys = torch.zeros(4, PAGE, 2, 32, dtype=torch.bfloat16)
    values = torch.ones_like(keys)
    keys[1, 3, 0, 7] = torch.nan
    output = torch.empty(2, 2, 32, dtype=torch.bfloat16)
    tables, lengths = torch.tensor([[1], [2]]), torch.tensor([5, 5])
    query = torch.ones(2, 2, 32, dtype=torch.bfloat16)
    kernels[torch.bfloat16](query, keys, values, output, tables, lengths, None, None)
    assert output[0, 0].isnan().all()
    assert (output[0, 1] == 1).all()
    assert (output[1] == 1).all()


def test_without_a_compiler_there_is_none(monkeypatch):
    monkeypatch.setattr(extensions, "FLAGS", ("--no-such-flag",))
    assert decode.compile_kernel(torch.float32) is None
    assert decode.compile_kernel(torch.float16) is None
