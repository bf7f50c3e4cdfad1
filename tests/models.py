"""Tiny random models with a tokenizer of their own, made in seconds and without a network."""

import json
from functools import cache
from pathlib import Path
from typing import Any

VOCABULARY = 512
CONTEXT = 256


@cache
def _trained_tokenizer() -> str:
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A few emoji are learned in part, so that some are cut by tokens.
    tokenizer.train_from_iterator([*list(topics.values())[:40], *["🙂 🚀 für €5"] * 20], trainer)
    trained: str = tokenizer.to_str()
    return trained


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def replace_tokenizer_by_sentencepiece(folder: Path) -> None:
    """Give a model of tiny_model() nothing but a `tokenizer.model` and its class, as the first Llamas have it."""
    import io
    from pydoc_data.topics import topics

    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(list(topics.values())[:40]).splitlines()),
        model_writer=trained,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    for path in Path(folder).glob("*token*"):
        path.unlink()
    (Path(folder) / "tokenizer.model").write_bytes(trained.getvalue())
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
"""What all tiny models have in common."""


def tiny_config(architecture: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    particular: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3},
        "gpt_neox": {"intermediate_size": 128},
    }
    own = particular.get(architecture, {"intermediate_size": 128, "num_key_value_heads": 2})
    return AutoConfig.for_model(architecture, **{**COMMON, **own, **changes})


def tiny_model(
    folder: Path | str,
    architecture: str = "llama",
    *,
    files: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    **changes: Any,
) -> Path:
    """Save a random model, in about so many safetensors files; return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    torch.manual_seed(seed)
    config = tiny_config(architecture, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # Transformers cuts between tensors, so the files are not all of one size.
    model.save_pretrained(folder, max_shard_size=size if files == 1 else size // files + 1)
    save_tokenizer(folder)
    return folder


def checkpoint_files(folder: Path) -> list[str]:
    index = Path(folder) / "model.safetensors.index.json"
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


QUANTISATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [48, 40]},  # the last blocks are smaller
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 3, "group_size": 16, "desc_act": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    "pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16, "symmetric": False}}},
    },
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
"""What config.json says of each of the ways in which quantise_checkpoint() quantises."""


def quantise_checkpoint(folder: Path, kind: str, to: Path) -> None:
    """Save a model of tiny_model() again, its linear layers quantised; leave in its folder what they stand for."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    quantised: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        is_linear = name.endswith("_proj" if kind == "mxfp4" else ".weight") and weight.dim() == (
            3 if kind == "mxfp4" else 2
        )
        if "layers." not in name or not is_linear or ".gate." in name:
            quantised[name] = weight
            continue
        parts, tensors[name] = QUANTISERS.get(kind, _eight_bits)(weight, kind)
        stem = f"{name}_" if kind == "mxfp4" else name.removesuffix("weight")
        quantised |= {stem + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", PT)
    save_file(quantised, to / "model.safetensors", PT)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISATIONS[kind]}))


PT = {"format": "pt"}


def _eight_bits(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    """Return the tensors of a weight [outputs, inputs] in 8 bits, by the ends of their names; and what they are."""
    import torch

    if kind == "bitsandbytes":
        most = weight.abs().amax(1)
        whole = (weight * 127 / most[:, None]).round().to(torch.int8)
        parts = {"weight": whole, "SCB": most, "weight_format": torch.zeros((), dtype=torch.uint8)}
        return parts, whole * most[:, None] / 127
    rows, columns = QUANTISATIONS[kind].get("weight_block_size", [1, weight.shape[1]])
    scales = torch.rand(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)) * 0.01 + 0.01
    wide = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
    small = (weight / wide).to(torch.float8_e4m3fn)
    return {"weight": small, "weight_scale_inv" if kind == "fp8" else "weight_scale": scales}, small.float() * wide


def in_words(numbers: Any, bits: int) -> Any:
    """Return numbers [rows, count] as int32 words: a stream of bits, the lowest first."""
    import numpy as np
    import torch

    stream = (numbers.numpy()[..., None] >> np.arange(bits) & 1).reshape(len(numbers), -1).astype(np.uint8)
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


def _random(weight: Any, bits: int, groups: Any) -> tuple[Any, Any, Any, Any]:
    """Return random numbers [outputs, inputs], zero points and scales [outputs, groups]; and what they are."""
    import torch

    count = int(groups.max()) + 1
    numbers = torch.randint(0, 2**bits, weight.shape)
    zeros = torch.randint(1, 2**bits, (len(weight), count))
    scales = ((torch.rand(len(weight), count) + 0.5) / 2**bits).half()
    return numbers, zeros, scales, (numbers - zeros[:, groups]) * scales.float()[:, groups]


def _gptq(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    about = QUANTISATIONS[kind]
    groups, bits = torch.arange(weight.shape[1]) // 16, about["bits"]
    if about["desc_act"]:
        groups = groups[torch.randperm(len(groups))]
    numbers, zeros, scales, plain = _random(weight, bits, groups)
    stored = zeros if "checkpoint_format" in about else zeros - 1
    words = {"qweight": in_words(numbers, bits).T, "qzeros": in_words(stored.T, bits), "scales": scales.T}
    return words | {"g_idx": groups.int(), "bias": torch.zeros(len(weight))}, plain


def _awq(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    numbers, zeros, scales, plain = _random(weight, 4, torch.arange(weight.shape[1]) // 16)

    def interleaved(rows: Any) -> Any:
        eights = rows.T.unflatten(1, (-1, 8))
        return in_words(torch.cat([eights[..., ::2], eights[..., 1::2]], -1).flatten(1), 4)

    return {"qweight": interleaved(numbers), "qzeros": interleaved(zeros), "scales": scales.T}, plain


def _integers(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    numbers, zeros, scales, plain = _random(weight, 4, torch.arange(weight.shape[1]) // 16)
    packed = {"weight_packed": in_words(numbers, 4), "weight_zero_point": in_words(zeros.T, 4).T}
    return packed | {"weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}, plain


def _nf4(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    numbers = torch.randint(0, 16, (weight.numel(),))
    values = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.15, 0.25, 0.3, 0.45, 0.55, 0.7, 1])
    small = torch.randint(0, 256, (-(-weight.numel() // 64),))
    large, steps = torch.rand(-(-len(small) // 256)) * 0.5, torch.linspace(-1, 1, 256)
    absmax = steps[small] * large[torch.arange(len(small)) // 256] + 0.6
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [*weight.shape]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.6}
    parts = {
        "weight": (numbers[::2] * 16 + numbers[1::2]).to(torch.uint8).unsqueeze(1),
        "weight.absmax": small.to(torch.uint8),
        "weight.quant_map": values,
        "weight.nested_absmax": large,
        "weight.nested_quant_map": steps,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
    }
    return parts, (values[numbers] * absmax[torch.arange(len(numbers)) // 64]).view(weight.shape)


def _mxfp4(weight: Any, kind: str) -> tuple[dict[str, Any], Any]:
    import torch

    experts, inputs, outputs = weight.shape
    numbers = torch.randint(0, 16, (experts, outputs, inputs // 32, 32))
    powers = torch.randint(-5, -2, (experts, outputs, inputs // 32))
    size = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[numbers % 8]
    plain = torch.where(numbers < 8, size, -size) * 2.0 ** powers.unsqueeze(-1)
    blocks = numbers[..., ::2] + 16 * numbers[..., 1::2]
    return {"blocks": blocks.byte(), "scales": (powers + 127).byte()}, plain.flatten(2).transpose(1, 2)


QUANTISERS = {
    "gptq": _gptq, "gptq_v2": _gptq, "awq": _awq, "pack-quantized": _integers, "nf4": _nf4, "mxfp4": _mxfp4,
}  # fmt: skip
"""What makes random tensors in the place of a weight, and the weight that they stand for; others are of 8 bits."""


def save_adapter(base: Path, folder: Path, targets: tuple[str, ...] = ("q_proj", "down_proj"), **changes: Any) -> Path:
    """Save a random LoRA or DoRA of rank 4 for a model of tiny_model(), as peft does; return its folder."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    torch.manual_seed(7)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.2
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.2
            if changes.get("use_dora"):
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = torch.rand(weight.shape[0]) * 4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": f"org/{base.name}", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(base: Path, adapter: Path, scale: float) -> None:
    """Merge an adapter of save_adapter() into the weights of its base."""
    from safetensors.torch import load_file, save_file

    weights, low = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in low.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = weights[f"{module}.weight"] + scale * low[name.replace("lora_A", "lora_B")] @ a
            magnitude = low.get(name.replace("lora_A.weight", "lora_magnitude_vector"))
            if magnitude is not None:
                weight = magnitude[:, None] * weight / weight.pow(2).sum(1, keepdim=True).sqrt()
            weights[f"{module}.weight"] = weight
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
