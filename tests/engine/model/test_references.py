"""What is read of quantised weights and adapters against those who made them, where `make test-real` brings them."""

import json

import pytest

torch = pytest.importorskip("torch")

from tests.engine.collect import make, running, submit  # noqa: E402
from tests.engine.model.plain import plain  # noqa: E402
from tests.engine.reference import PROMPTS, Reference  # noqa: E402
from tests.models import save_tokenizer, tiny_model  # noqa: E402

pytestmark = pytest.mark.engine
REASON = "`make test-real` brings it"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bits_are_what_bitsandbytes_makes_of_them(kind, nested, storage):
    functional = pytest.importorskip("bitsandbytes.functional", reason=REASON)
    weight, state = functional.quantize_4bit(
        torch.randn(36, 70), blocksize=64, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    tensors = {f"proj.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    _, found = plain({"proj.weight": weight, **tensors}, quant_method="bitsandbytes", load_in_4bit=True)
    assert torch.allclose(found, functional.dequantize_4bit(weight, state), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_packed_integers_are_what_compressed_tensors_makes_of_them(bits, symmetric):
    pytest.importorskip("compressed_tensors", reason=REASON)
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32, type="int")
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    state = {"weight": torch.randn(72, 96), "weight_scale": torch.rand(72, 3) * 0.1 + 0.05}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-3, 4, (72, 3), dtype=torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(stored), scheme)["weight"]
    about = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": bits}}}}
    _, found = plain(
        {f"proj.{name}": tensor for name, tensor in stored.items()}, quant_method="compressed-tensors", **about
    )
    assert torch.allclose(found, expected.float(), atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_transformers_saves_through_bitsandbytes_is_served(tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason=REASON)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": kind == "nf4"}
    config = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else how))
    folder = tiny_model(tmp_path / "base", tie_word_embeddings=True)
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "quantised")
    save_tokenizer(tmp_path / "quantised")
    quantised.dequantize(torch.float32).save_pretrained(tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")
    about = json.loads((tmp_path / "plain" / "config.json").read_text())
    about.pop("quantization_config", None)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(about))
    served_as(tmp_path / "plain", model_name_or_path=str(tmp_path / "quantised"), dtype="float32")


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path, changes):
    peft = pytest.importorskip("peft", reason=REASON)
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **changes
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    save_tokenizer(tmp_path / "merged")
    served_as(tmp_path / "merged", model_name_or_path=str(base), adapter=str(tmp_path / "adapter"))


def served_as(folder, **options):
    """Check that a model is served as the plain one of a folder answers."""
    reference = Reference(folder)
    with running(make(**options)) as engine:
        for prompt in PROMPTS:
            answer = submit(engine, prompt, do_sample=False, max_new_tokens=8).wait()
            assert answer.token_ids() == reference.greedy(prompt, max_new_tokens=8)
