import json
import math
import os
import re
import subprocess
import sys

import pytest

from mii_hpc.config import MIIWarning, ModelConfig
from mii_hpc.errors import ConfigError
from mii_hpc.submission.checkpoint import check_model

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}


@pytest.fixture
def model(tmp_path):
    """Make a model folder with the given config.json, a tokenizer, and a file of weights, which is empty."""

    def make(config=LLAMA):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (folder / "tokenizer.json").touch()
        write_tensors(folder / "model.safetensors")
        return folder

    return make


def checked(path, **fields):
    return check_model(ModelConfig(model_name_or_path=str(path), **fields))


def test_what_fits_is_accepted(model):
    assert checked(model(), tensor_parallel=8, max_length=4096).model_name_or_path == str(model())
    assert checked(model({"text_config": None}), tensor_parallel=7)


@pytest.mark.parametrize(
    ("config", "fields", "sentence"),
    [
        (LLAMA, {"tensor_parallel": 3}, "tensor_parallel=3: does not divide the model's 32 attention heads; "
                                        "allowed are 1, 2, 4, 8, 16, 32"),
        ({**LLAMA, "num_key_value_heads": 6}, {"tensor_parallel": 4},
         "tensor_parallel=4: does not divide the model's 6 "
                                                                      "KV heads; allowed are 1, 2"),
        ({"n_head": 12}, {"tensor_parallel": 5}, "tensor_parallel=5: does not divide the model's 12 attention heads; "
                                                 "allowed are 1, 2, 3, 4, 6, 12"),
        ({"text_config": LLAMA}, {"tensor_parallel": 3}, "tensor_parallel=3: does not divide"),
        (LLAMA, {"max_length": 4097}, "max_length=4097: the model's context is 4096 tokens, and no more is allowed"),
        ({"n_positions": 1024}, {"max_length": 2048}, "max_length=2048: the model's context is 1024 tokens"),
        ("not json", {}, "config.json is unreadable"),
        ("[1]", {}, "config.json is unreadable"),
        ('{"text_config": 3}', {}, "config.json is unreadable"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(model, config, fields, sentence):
    with pytest.raises(ConfigError) as refusal:
        checked(model(config), **fields)
    assert sentence in str(refusal.value)


def test_a_folder_without_config_json_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=rf"^model_name_or_path='{tmp_path}': the folder has no config.json"):
        checked(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "a/b/c", "~/absent", ".."])
def test_a_folder_that_does_not_exist_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^model_name_or_path='.*': (no such folder|the folder has no config.json)"):
        checked(name)


def test_the_path_becomes_absolute_but_keeps_its_links(model, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(model())
    monkeypatch.chdir(tmp_path)
    assert checked("link").model_name_or_path == str(tmp_path / "link")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checked("~/model").model_name_or_path == str(tmp_path / "model")


def test_the_echo_engine_needs_no_model():
    config = ModelConfig(inference_engine_config={"engine": "echo"}, tensor_parallel=3)
    assert check_model(config) is config


HUB = """
from mii_hpc.submission.checkpoint import check_model
from mii_hpc.config import MIIWarning, ModelConfig
from mii_hpc.errors import ConfigError

for name, tp in (("org/cached", 4), ("org/cached", 3), ("org/absent", 1)):
    try:
        print(check_model(ModelConfig(model_name_or_path=name, tensor_parallel=tp)).model_name_or_path)
    except ConfigError as error:
        print(error)
"""


def test_hub_names_come_from_the_cache_when_offline(tmp_path):
    cached = tmp_path / "hub" / "models--org--cached"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("c0ffee")
    (cached / "snapshots" / "c0ffee").mkdir(parents=True)
    snapshot = cached / "snapshots" / "c0ffee"
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    (snapshot / "tokenizer.model").touch()
    write_tensors(snapshot / "model.safetensors")
    # A process of its own, because huggingface_hub reads its environment when it is imported.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env={**environment, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found, wrong_shape, absent = done.stdout.splitlines()
    assert found == "org/cached"
    assert wrong_shape.startswith("tensor_parallel=3: does not divide the model's 32 attention heads")
    assert absent.startswith("model_name_or_path='org/absent': no such folder, and neither the Hugging Face")


def test_tokenizer_is_checked_before_the_queue(model):
    folder = model()
    assert checked(folder, tokenizer=str(folder / ".." / "model")).tokenizer == str(folder)
    with pytest.raises(ConfigError, match=r"tokenizer='/nowhere/at/all': no such folder"):
        checked(folder, tokenizer="/nowhere/at/all")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=rf"model_name_or_path='{folder}': the folder has no tokenizer, such as"):
        checked(folder)
    other = folder.parent / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match=rf"tokenizer='{other}': the folder has no tokenizer, such as"):
        checked(folder, tokenizer=str(other))
    (other / "tokenizer.model").touch()
    assert checked(folder, tokenizer=str(other))


def write_tensors(path, **tensors):
    """Write a safetensors file of tensors that are (dtype, shape), and zero."""
    entries, end = {}, 0
    for name, (kind, shape) in tensors.items():
        size = math.prod(shape) * int(re.search(r"\d+", kind)[0]) // 8
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end := end + size]}
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


PLAIN = {"model.layers.0.mlp.weight": ("BF16", [4, 4]), "model.layers.1.mlp.weight": ("BF16", [4, 4])}
WEIGHT, SCALE = "model.layers.0.mlp.weight", "model.layers.0.mlp.weight_scale_inv"


def quantised(**about):
    return {"quantization_config": about}


FP8, AWQ = quantised(quant_method="fp8"), quantised(quant_method="awq", bits=4)
GPTQ, NF4 = quantised(quant_method="gptq", bits=4), quantised(quant_method="bitsandbytes", load_in_4bit=True)
MXFP4 = quantised(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
MLP = "model.layers.0.mlp"
AWQ_LAYER = {f"{MLP}.qweight": ("I32", [32, 1]), f"{MLP}.qzeros": ("I32", [2, 1]), f"{MLP}.scales": ("F16", [2, 8])}
GPTQ_LAYER = {**AWQ_LAYER, f"{MLP}.qweight": ("I32", [4, 8])}


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ({"vocab_size": 8, "hidden_size": 4}, {"model.embed_tokens.weight": ("BF16", [9, 4])},
         "has model.embed_tokens.weight as [9, 4], and config.json says vocab_size=8 and hidden_size=4"),
        (quantised(quant_method="aqlm"), PLAIN, "quant_method='aqlm': the checkpoint's weights are quantised"),
        (quantised(quant_method="compressed-tensors", config_groups={"group_0": {"weights": {"num_bits": 4}}}), PLAIN,
         "num_bits=4: the checkpoint's weights are quantised in a way that is not read; awq, bitsandbytes, "),
        (quantised(quant_method="compressed-tensors", format="nvfp4-pack-quantized", config_groups={"group_0": {}}),
         PLAIN, "format='nvfp4-pack-quantized': the checkpoint's"),
        (quantised(quant_method="compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}), PLAIN,
         "sparsity_config.format='sparse-24-bitmask': the checkpoint's"),
        (FP8, {WEIGHT: ("F8_E4M3", [4, 4])}, f"the checkpoint lacks {SCALE}: {WEIGHT} is F8_E4M3"),
        (FP8, {WEIGHT: ("F8_E4M3", [4, 4]), SCALE: ("F32", [2, 3])}, f"{SCALE} as F32 [2, 3], which do not fit each"),
        (FP8, {WEIGHT: ("F8_E4M3", [4, 4]), SCALE: ("U8", [1, 1])}, f"{SCALE} as U8 [1, 1], which do not fit each"),
        (FP8, {WEIGHT: ("I8", [4, 4]), SCALE: ("F32", [1, 1])}, f"a way that is not read: it has {WEIGHT} as I8"),
        (FP8, {**PLAIN, SCALE: ("F32", [1, 1])}, f"it has {SCALE}"),
        (FP8, {"model.experts.gate_up_proj": ("F8_E4M3", [2, 4, 4])}, "it has model.experts.gate_up_proj as F8_E4M3"),
        (quantised(quant_method="awq", version="gemv"), PLAIN, "version='gemv': the checkpoint's weights are"),
        (quantised(quant_method="awq", backend="llm-awq"), PLAIN, "backend='llm-awq': the checkpoint's weights are"),
        (AWQ, {**AWQ_LAYER, f"{MLP}.qzeros": ("I32", [3, 1])}, f"{MLP}.qzeros as I32 [3, 1], {MLP}.scales as F16 [2,"),
        (AWQ, {**AWQ_LAYER, f"{MLP}.act.scales": ("F16", [8])}, f"it has {MLP}.act.scales as F16"),
        (AWQ, {f"{MLP}.qweight": ("I32", [32, 1])}, f"the checkpoint lacks {MLP}.qzeros: {MLP}.qweight is I32"),
        (FP8, AWQ_LAYER, f"it has {MLP}.qweight as I32"),
        ({}, AWQ_LAYER, f"it has {MLP}.qweight as I32"),
        (quantised(quant_method="gptq", bits=5), PLAIN, "bits=5: the checkpoint's"),
        (quantised(quant_method="gptq", bits=4, checkpoint_format="marlin"), PLAIN, "checkpoint_format='marlin': the"),
        (quantised(quant_method="gptq", bits=4, is_marlin_format=True), PLAIN, "is_marlin_format=True: the"),
        (GPTQ, {**GPTQ_LAYER, f"{MLP}.g_idx": ("I32", [31])}, f"{MLP}.g_idx as I32 [31], which do not fit"),
        (GPTQ, {**GPTQ_LAYER, f"{MLP}.qweight": ("F32", [4, 8])}, f"{MLP}.qweight as F32 [4, 8], {MLP}.qzeros as"),
        (MXFP4, {"e.down_blocks": ("U8", [2, 4, 3, 16]), "e.down_scales": ("U8", [2, 4])},
         "e.down_blocks as U8 [2, 4, 3, 16], e.down_scales as U8 [2, 4], which do not fit each other"),
        (NF4, {WEIGHT: ("U8", [8, 1]), f"{WEIGHT}.absmax": ("F32", [1]), f"{WEIGHT}.quant_map": ("F32", [16])},
         f"the checkpoint lacks {WEIGHT}.quant_state.bitsandbytes__fp4: {WEIGHT} is U8"),
        (NF4, {WEIGHT: ("U8", [8, 1])}, f"it has {WEIGHT} as U8"),
        (quantised(quant_method="compressed-tensors", transform_config={"R1": 1}), PLAIN, "transform_config={'R1'"),
        (quantised(quant_method="fp8", weight_block_size=[0, 4]), PLAIN, "weight_block_size=[0, 4]: must be two"),
        ({}, {**PLAIN, SCALE: ("F32", [1, 1])}, f"it has {SCALE}"),
        ({}, {"mlp.experts": ("BF16", [2, 4, 4]), "mlp.experts_scale": ("F32", [2])}, "it has mlp.experts_scale"),
        ({}, {**PLAIN, "model.layers.0.mlp.SCB": ("F32", [4])}, "it has model.layers.0.mlp.SCB"),
        ({}, {WEIGHT: ("F8_E4M3", [4, 4])}, f"it has {WEIGHT} as F8_E4M3"),
        ({"num_hidden_layers": 4}, PLAIN, "no tensors of layer 2, 3, of num_hidden_layers=4"),
    ],
)  # fmt: skip
def test_what_the_headers_tell_is_refused_before_the_queue(model, config, tensors, sentence):
    folder = model({**LLAMA, **config})
    write_tensors(folder / "model.safetensors", **tensors)
    for ranks in (1, 2):
        with pytest.raises(ConfigError) as refusal:
            checked(folder, tensor_parallel=ranks)
        assert sentence in str(refusal.value)


@pytest.mark.parametrize("shape", [[], [1], [4], [4, 1], [1, 1], [2, 2]])
def test_quantised_weights_are_accepted_with_their_scales(model, shape):
    folder = model({**LLAMA, **FP8})
    tensors = {WEIGHT: ("F8_E4M3", [4, 4]), SCALE: ("F32", shape), "model.layers.0.mlp.input_scale": ("F32", [1])}
    write_tensors(folder / "model.safetensors", **tensors)
    assert checked(folder, tensor_parallel=2)


def test_packed_weights_are_accepted_as_published(model):
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = {f"{experts}_blocks": ("U8", [4, 8, 2, 16]), f"{experts}_scales": ("U8", [4, 8, 2])}
    four_bits = {
        WEIGHT: ("U8", [8, 1]), f"{WEIGHT}.absmax": ("U8", [1]), f"{WEIGHT}.quant_map": ("F32", [16]),
        f"{WEIGHT}.nested_absmax": ("F32", [1]), f"{WEIGHT}.nested_quant_map": ("F32", [256]),
        f"{WEIGHT}.quant_state.bitsandbytes__nf4": ("U8", [99]),
    }  # fmt: skip
    int4 = {"format": None, "weights": {"num_bits": 4, "type": "int"}}
    integers = {f"{MLP}.weight_packed": ("I32", [8, 4]), f"{MLP}.weight_scale": ("BF16", [8, 2])}
    integers[f"{MLP}.weight_shape"] = ("I64", [2])
    for config, tensors in (
        (quantised(quant_method="awq", bits=4, group_size=16, version="GEMM", modules_to_not_convert=None), AWQ_LAYER),
        (quantised(quant_method="gptq", bits=4, checkpoint_format="gptq", pack_dtype="int32"), GPTQ_LAYER),
        (GPTQ, {**GPTQ_LAYER, f"{MLP}.g_idx": ("I32", [32])}),
        (MXFP4, {**blocks, f"{experts}_bias": ("BF16", [4, 8])}),
        (NF4, four_bits),
        (
            quantised(quant_method="compressed-tensors", format="pack-quantized", config_groups={"group_0": int4}),
            integers,
        ),
    ):
        folder = model({**LLAMA, **config})
        write_tensors(folder / "model.safetensors", **tensors)
        assert checked(folder, tensor_parallel=2)


def test_layers_that_have_the_inputs_first_are_not_read_quantised(model):
    with pytest.raises(ConfigError, match="model_type='gpt2': the checkpoint's weights are quantised in a way that is"):
        checked(model({**LLAMA, **GPTQ, "model_type": "gpt2"}))


def test_an_adapter_fits_a_packed_weight(model, adapter):
    folder = model({**LLAMA, **AWQ})
    write_tensors(folder / "model.safetensors", **AWQ_LAYER)
    assert checked(folder, adapter=adapter(tensors={A: ("F32", [2, 32]), B: ("F32", [8, 2])}))
    with pytest.raises(ConfigError, match=r"of the shape \[4, 4\], and the model's is \[8, 32\]"):
        checked(folder, adapter=adapter())


def test_what_cannot_be_sharded_is_refused_before_the_queue(model):
    folder = model({**LLAMA, "model_type": "gpt2"})
    assert checked(folder)
    with pytest.raises(ConfigError, match="tensor_parallel=2: models of the type 'gpt2' cannot be sharded"):
        checked(folder, tensor_parallel=2)
    assert checked(model({**LLAMA, "model_type": "falcon", "new_decoder_architecture": True}), tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel=2: models of the type 'falcon' cannot be sharded"):
        checked(model({**LLAMA, "model_type": "falcon"}), tensor_parallel=2)


def test_several_ranks_may_hold_the_same_kv_head(model):
    assert checked(model({**LLAMA, "num_key_value_heads": 2}), tensor_parallel=4)


def test_plain_tensors_are_accepted(model):
    folder = model({**LLAMA, "num_hidden_layers": 2})
    # Gemma 3n has a parameter that is called so.
    write_tensors(folder / "model.safetensors", **PLAIN, **{"model.layers.0.altup.correct_output_scale": ("BF16", [4])})
    assert checked(folder)


def test_files_that_are_cut_short_or_missing_are_refused(model):
    folder = model()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"model_name_or_path='{folder}': the folder has no weights: one of model"):
        checked(folder)
    write_tensors(folder / "one.safetensors", **PLAIN)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.layers.0.mlp.weight": "one.safetensors"}}))
    assert checked(folder)
    (folder / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"one\.safetensors is cut short: it has \d+ bytes of \d+"):
        checked(folder)
    (folder / "one.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"one\.safetensors is no safetensors file"):
        checked(folder)
    index.write_text(json.dumps({"weight_map": {"model.layers.0.mlp.weight": "two.safetensors"}}))
    with pytest.raises(ConfigError, match=r"names two\.safetensors, which is not there"):
        checked(folder)


def test_an_adapter_is_named_with_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(
        ConfigError, match=f"it has an adapter of 'org/base' alone; serve 'org/base' with adapter='{tmp_path}'"
    ):
        checked(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="it has an adapter alone; serve its base model with adapter="):
        checked(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    write_tensors(tmp_path / "model.safetensors", **PLAIN)
    with pytest.raises(ConfigError, match="beside the weights lies an adapter, which would not be used"):
        checked(tmp_path)


LORA = {"peft_type": "LORA", "lora_alpha": 16, "base_model_name_or_path": "org/model", "loftq_config": {}}
A, B = "base_model.model.model.layers.0.mlp.lora_A.weight", "base_model.model.model.layers.0.mlp.lora_B.weight"
LOW = {A: ("F32", [2, 4]), B: ("F32", [4, 2])}
MAGNITUDE = "base_model.model.model.layers.0.mlp.lora_magnitude_vector"


@pytest.fixture
def adapter(tmp_path):
    def make(config=LORA, tensors=LOW):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        write_tensors(folder / "adapter_model.safetensors", **tensors)
        return str(folder)

    return make


def test_an_adapter_that_fits_is_accepted(model, adapter, monkeypatch):
    folder = model({**LLAMA, "num_hidden_layers": 2})
    write_tensors(folder / "model.safetensors", **PLAIN)
    assert checked(folder, adapter=adapter()).adapter == adapter()
    monkeypatch.chdir(folder.parent)
    assert checked(folder, adapter="adapter").adapter == adapter()
    assert checked(folder, adapter=adapter({**LORA, "use_dora": True}, {**LOW, MAGNITUDE: ("F32", [4])}))
    named = {"model.layers.0.mlp.lora_A.weight": LOW[A], "model.layers.0.mlp.lora_B.weight": LOW[B]}
    assert checked(folder, adapter=adapter(tensors=named))
    write_tensors(folder / "model.safetensors", **{name.removeprefix("model."): of for name, of in PLAIN.items()})
    assert checked(folder, adapter=adapter())
    with pytest.warns(MIIWarning, match="it was made for 'org/other', and is merged into"):
        checked(folder, adapter=adapter({**LORA, "base_model_name_or_path": "org/other"}))


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ("[1]", LOW, "adapter_config.json is none of a LoRA"),
        ({"peft_type": "LORA"}, LOW, "adapter_config.json is none of a LoRA: 'lora_alpha'"),
        ({**LORA, "lora_alpha": "16"}, LOW, "adapter_config.json is none of a LoRA"),
        ({**LORA, "alpha_pattern": {"(": 2}}, LOW, "adapter_config.json is none of a LoRA"),
        ({**LORA, "peft_type": "IA3"}, LOW, "peft_type='IA3': only 'LORA' can be merged"),
        ({**LORA, "use_dora": True}, LOW, "model.layers.0.mlp has no magnitude, and use_dora=True"),
        ({**LORA, "use_dora": True}, {**LOW, MAGNITUDE: ("F32", [2])}, "has an unexpected magnitude, and"),
        (LORA, {**LOW, MAGNITUDE: ("F32", [4])}, "has an unexpected magnitude, and use_dora=False"),
        ({**LORA, "bias": "all"}, LOW, "bias=all: cannot be merged"),
        ({**LORA, "modules_to_save": ["lm_head"]}, LOW, "modules_to_save="),
        ({**LORA, "init_lora_weights": "pissa"}, LOW, "init_lora_weights='pissa' has changed the base model as well"),
        (LORA, {}, "adapter_model.safetensors is empty"),
        (LORA, {A: LOW[A]}, "lora_A and lora_B of model.layers.0.mlp do not fit each other"),
        (LORA, {**LOW, B: ("F32", [4, 3])}, "lora_A and lora_B of model.layers.0.mlp do not fit each other"),
        (LORA, {**LOW, B: ("F32", [6, 2])}, "it is for model.layers.0.mlp.weight of the shape [6, 4], and"),
        (LORA, {name.replace("mlp", "q"): of for name, of in LOW.items()}, "it changes model.layers.0.q.weight, and"),
        (LORA, {**LOW, "model.layers.0.mlp.lora_E": ("F32", [4])}, "which is no part of a LoRA"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(model, adapter, config, tensors, sentence):
    folder = model({**LLAMA, "num_hidden_layers": 2})
    write_tensors(folder / "model.safetensors", **PLAIN)
    with pytest.raises(ConfigError, match=r"^adapter='/.*': ") as refusal:
        checked(folder, adapter=adapter(config, tensors))
    assert sentence in str(refusal.value)


def test_an_adapter_is_a_folder(model, tmp_path):
    with pytest.raises(ConfigError, match="adapter='/no/adapter': no such folder"):
        checked(model(), adapter="/no/adapter")
    with pytest.raises(ConfigError, match="takes a model with weights in safetensors files"):
        checked(model(), adapter=str(tmp_path))


def test_bin_files_are_for_one_rank_and_plain_weights(model):
    folder = model()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()
    assert checked(folder)
    for fields in ({"tensor_parallel": 2}, {"quantization_mode": "int8"}):
        with pytest.raises(ConfigError, match=r"(=2|='int8') takes weights in safetensors files, and here is"):
            checked(folder, **fields)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **FP8}))
    with pytest.raises(ConfigError, match="a quantised checkpoint takes weights in safetensors files"):
        checked(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "mamba"}, "models of the type 'mamba' cannot be served: it keeps a state"),
        ({"model_type": "deepseek_v32"}, "its indexer keeps keys of its own"),
        ({"model_type": "bert"}, "models of the type 'bert' cannot be served: its tokens attend to later ones"),
        ({"model_type": "strange"}, "model_type='strange': none of transformers' types of causal language models"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "model_type='llava': none of"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "it keeps a state besides keys and values"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "it is an encoder with a decoder"),
    ],
)
def test_what_no_way_serves_is_refused_before_the_queue(model, config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        checked(model({**LLAMA, **config}))


def test_a_model_that_brings_its_code_may_be_of_any_type(model):
    folder = model({**LLAMA, "model_type": "strange", "auto_map": {"AutoModelForCausalLM": "modeling.Strange"}})
    assert checked(folder, trust_remote_code=True)
    with pytest.raises(ConfigError, match="trust_remote_code=True runs the code that the model brings"):
        checked(folder)
