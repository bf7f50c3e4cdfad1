"""Each formula against numbers that are packed here."""

import json

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine.model.dequantising import unpacked  # noqa: E402
from mii_hpc.errors import ConfigError  # noqa: E402
from tests.engine.model.plain import plain  # noqa: E402
from tests.models import QUANTISATIONS, QUANTISERS, in_words  # noqa: E402

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("kind", QUANTISERS)
def test_numbers_that_are_known_come_back(kind):
    torch.manual_seed(0)
    shape, name = ((2, 64, 10), "experts.down_proj") if kind == "mxfp4" else ((64, 96), "proj.weight")
    parts, expected = QUANTISERS[kind](torch.empty(shape), kind)
    parts.pop("bias", None)
    stem = f"{name}_" if kind == "mxfp4" else "proj."
    found, weight = plain({stem + part: tensor for part, tensor in parts.items()}, **QUANTISATIONS[kind])
    assert found == name
    assert torch.allclose(weight.float(), expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_the_lowest_bits_first(bits):
    numbers = torch.randint(0, 2**bits, (5, 96))
    assert torch.equal(unpacked(in_words(numbers, bits), bits, 96), numbers)
    assert torch.equal(unpacked(in_words(numbers, bits), bits, 40), numbers[:, :40])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_s_first_format_stores_zero_points_less_one(bits):
    """A layer may have other bits than config.json says."""
    tensors = {
        "proj.qweight": in_words(torch.full((32, 64), 2), bits).T,
        "proj.qzeros": in_words(torch.zeros(1, 32, dtype=torch.int64), bits),
        "proj.scales": torch.full((1, 32), 0.5),
    }
    for about, expected in (({"bits": 8}, 0.5), ({"bits": 8, "format": "gptq_v2"}, 1.0)):
        assert plain(tensors, quant_method="gptq", **about)[1].unique().tolist() == [expected]
    tensors["proj.qzeros"] = torch.full_like(tensors["proj.qzeros"], -1)
    with pytest.raises(
        ConfigError, match=r"proj\.qzeros: it has zero points that checkpoint_format='gptq' cannot hold"
    ):
        plain(tensors, quant_method="gptq", bits=bits)
    tensors["proj.g_idx"] = torch.ones(64, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"proj\.g_idx: it names groups that are not there"):
        plain(tensors, quant_method="gptq", bits=bits, checkpoint_format="gptq_v2")


def test_an_awq_word_has_the_even_outputs_first():
    """As AutoAWQ's order_map: the half-bytes of a word, the lowest first, are of the outputs 0 2 4 6 1 3 5 7."""
    word = sum(output << 4 * place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    tensors = {
        "proj.qweight": torch.tensor([[word]], dtype=torch.int32),
        "proj.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "proj.scales": torch.ones(1, 8),
    }
    assert plain(tensors, quant_method="awq")[1].flatten().tolist() == [*range(8)]


def test_mxfp4_is_what_transformers_makes_of_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 10, 4), dtype=torch.uint8)
    name, weight = plain(
        {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}, quant_method="mxfp4"
    )
    assert name == "experts.gate_up_proj"
    assert torch.equal(weight, convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"[]",
        b'{"shape": [9, 9], "blocksize": 64}',
        b'{"shape": [8, 2], "blocksize": 0}',
        b'{"shape": [8, 2], "blocksize": 4}',
        b'{"shape": [4, 2], "blocksize": 1e999}',
        b'{"shape": ["a"]}',
        b"\xff",
        b"[" * 99999,
    ],
)
def test_a_state_that_describes_another_weight_is_refused(state):
    tensors = {
        "proj.weight": torch.zeros(8, 1, dtype=torch.uint8),
        "proj.weight.absmax": torch.ones(1),
        "proj.weight.quant_map": torch.ones(16),
        "proj.weight.quant_state.bitsandbytes__nf4": torch.tensor([*state], dtype=torch.uint8),
    }
    with pytest.raises(ConfigError, match=r"bitsandbytes__nf4: it does not describe the weight"):
        plain(tensors, quant_method="bitsandbytes", load_in_4bit=True)
    good = torch.tensor([*json.dumps({"shape": [8, 2], "blocksize": 64}).encode()], dtype=torch.uint8)
    tensors["proj.weight.quant_state.bitsandbytes__nf4"] = good
    assert plain(tensors, quant_method="bitsandbytes")[1].shape == (8, 2)
