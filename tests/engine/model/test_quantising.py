"""Weights of 8 and 4 bits: products are near the plain ones, and models near themselves."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from mii_hpc.engine import extensions  # noqa: E402
from mii_hpc.engine.model import quantising  # noqa: E402
from mii_hpc.engine.model.linears import Share  # noqa: E402
from mii_hpc.engine.model.quantising import KERNEL_ROWS, QuantisedLinear  # noqa: E402
from mii_hpc.errors import ConfigError  # noqa: E402
from tests.engine.attention.test_cpu import CAPABILITIES  # noqa: E402
from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.pair import Replica  # noqa: E402
from tests.engine.reference import PROMPTS, Reference  # noqa: E402
from tests.lacking import lacking  # noqa: E402
from tests.models import tiny_model  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
ERRORS = {"int8": 0.01, "fp8": 0.04, "int4": 0.1}
"""Of a product with weights drawn from a normal distribution, in parts of its size."""
SMALL = {"max_batch_size": 8, "max_batch_tokens": 40, "page_size": 8}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.1}


@pytest.fixture(params=ERRORS)
def mode(request):
    return request.param


def linear(mode, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(
        2080, 70, bias=bias
    )  # more inputs than the kernel widens at once, outputs that do not fill its last
    nn.init.normal_(layer.weight)
    return layer, QuantisedLinear(Share(layer.weight, nn.Parameter(layer.bias.to(dtype)) if bias else None), mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_near_the_plain_one(mode, dtype):
    layer, quantised = linear(mode, dtype=dtype)
    rows = torch.randn(KERNEL_ROWS + 5, 2080).to(dtype)
    expected = layer(rows.float())
    size = expected.std()
    for count in (1, 6, KERNEL_ROWS, KERNEL_ROWS + 5):
        found = quantised(rows[:count][None])[0]
        assert found.dtype == dtype
        assert (found - expected[:count]).std() < (ERRORS[mode] + 0.01) * size


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernel_computes_with_what_is_stored(monkeypatch, mode, capability):
    if capability != "its own":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    quantising._library.cache_clear()
    _, quantised = linear(mode, bias=False)
    quantising._library.cache_clear()
    if quantised._kernel is None:
        lacking("there is no compiler")
    for count in (1, 4, 7):
        rows = torch.randn(count, 2080)
        expected = rows.double() @ quantised.dequantised(torch.float32).double().T
        assert torch.allclose(quantised(rows).double(), expected, atol=1e-3)
    rows[0, 3] = torch.nan
    assert quantised(rows)[0].isnan().all()
    assert quantised(rows)[1:].isfinite().all()


def test_what_is_stored(mode):
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    weight[0] = 0
    weight[1] *= 1e-6
    weight[2] *= 1e6
    weight[3, 7] = torch.nan
    quantised = QuantisedLinear(Share(nn.Parameter(weight), None), mode)
    found = quantised.dequantised(torch.float32)
    assert (found[0] == 0).all()
    assert found[3].isnan().any()
    spread = (found - weight)[[1, 2, 4, 5, 6, 7]].std(1) / weight[[1, 2, 4, 5, 6, 7]].std(1)
    assert (spread < ERRORS[mode]).all()
    assert quantised.quantised.nbytes == weight.numel() // (2 if mode == "int4" else 1)


def test_without_a_compiler_the_weights_are_widened(monkeypatch, mode):
    _, with_kernel = linear(mode)
    monkeypatch.setattr(extensions, "FLAGS", ("--no-such-flag",))
    quantising._library.cache_clear()
    _, without = linear(mode)
    quantising._library.cache_clear()
    assert without._kernel is None
    rows = torch.randn(3, 2080)
    assert torch.allclose(with_kernel(rows), without(rows), atol=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("quantised"), "qwen2", **SIZES))


def test_a_model_is_near_itself(folder, mode, models):
    reference = Reference(folder)
    sizes = []
    for quantization_mode in (None, mode):
        engine = make(model_name_or_path=folder, quantization_mode=quantization_mode, inference_engine_config=SMALL)
        with running(engine):
            answers = [submit(engine, prompt, do_sample=False, max_new_tokens=8, logprobs=True) for prompt in PROMPTS]
            for prompt, one in zip(PROMPTS, answers, strict=True):
                expected = reference.logprobs(prompt, one.wait().token_ids())
                assert one.logprobs() == pytest.approx(expected, abs=2.0 if mode == "int4" else 0.3)
        sizes.append(models[-1].weights)
    layer = models[-1].module.model.layers[1]
    assert {type(part) for name, part in layer.named_modules() if name.endswith("proj")} == {QuantisedLinear}
    assert models[-1].module.lm_head.weight.dtype == torch.float32
    linears = sum(part.quantised.numel() for part in layer.modules() if isinstance(part, QuantisedLinear)) * 2 * 2
    # Here a scale is for so few weights that it counts.
    assert sizes[0] - sizes[1] > {"int8": 2.6, "fp8": 2.6, "int4": 6}[mode] / 4 * linears


def test_two_ranks(tmp_path):
    folder = str(tiny_model(tmp_path, "qwen2", tie_word_embeddings=True, **SIZES))
    reference = Reference(folder)
    with Replica(model_name_or_path=folder, quantization_mode="int4", inference_engine_config=SMALL) as replica:
        assert replica.ready() is None
        answers = replica.answers([(prompt, {"do_sample": False, "max_new_tokens": 1}) for prompt in PROMPTS])
    for prompt, (_, token_ids, _) in zip(PROMPTS, answers, strict=True):
        best = reference.greedy(prompt, max_new_tokens=1)
        chosen, highest = (reference.logprobs(prompt, first)[0] for first in (token_ids, best))
        assert chosen == pytest.approx(highest, abs=0.6)


def test_what_has_no_plain_linear_layers_is_refused(tmp_path):
    folder = str(tiny_model(tmp_path, "gpt2", n_embd=64, n_head=4, n_layer=2, n_positions=256))
    with pytest.raises(
        ConfigError, match="quantization_mode='int8': the model has no linear layers that can be quantise"
    ):
        make(model_name_or_path=folder, quantization_mode="int8").load(lambda sentence: None)
