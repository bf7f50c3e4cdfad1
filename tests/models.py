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
}
"""What config.json says of each of the ways in which quantise_checkpoint() quantises."""


def quantise_checkpoint(folder: Path, kind: str, to: Path) -> None:
    """Save a model of tiny_model() again, its linear layers in 8 bits; leave in its folder what they stand for."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    quantised: dict[str, torch.Tensor] = {}
    for name, weight in tensors.items():
        if not ("layers." in name and name.endswith("proj.weight")) and ".experts." not in name:
            quantised[name] = weight
            continue
        stem = name.removesuffix("weight")
        if kind == "bitsandbytes":
            most = weight.abs().amax(1)
            whole = (weight * 127 / most[:, None]).round().to(torch.int8)
            quantised |= {name: whole, f"{stem}SCB": most, f"{stem}weight_format": torch.zeros((), dtype=torch.uint8)}
            tensors[name] = whole * most[:, None] / 127
            continue
        rows, columns = QUANTISATIONS[kind].get("weight_block_size", [1, weight.shape[1]])
        scales = torch.rand(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)) * 0.01 + 0.01
        wide = scales.repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)[:, : weight.shape[1]]
        small = (weight / wide).to(torch.float8_e4m3fn)
        quantised |= {name: small, stem + ("weight_scale_inv" if kind == "fp8" else "weight_scale"): scales}
        tensors[name] = small.float() * wide
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(quantised, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISATIONS[kind]}))


def save_adapter(base: Path, folder: Path, targets: tuple[str, ...] = ("q_proj", "down_proj"), **changes: Any) -> Path:
    """Save a random LoRA of rank 4 for a model of tiny_model(), as peft does; return its folder."""
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
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": f"org/{base.name}", **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(base: Path, adapter: Path, scale: float) -> None:
    """Add an adapter of save_adapter() to the weights of its base."""
    from safetensors.torch import load_file, save_file

    weights, low = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in low.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{module}.weight"] += scale * low[name.replace("lora_A", "lora_B")] @ a
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
