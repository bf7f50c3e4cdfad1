"""What can be known of a model before any of its weights are read. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mii_hpc.config import ModelConfig
from mii_hpc.errors import ConfigError

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def check_model(model: ModelConfig) -> ModelConfig:
    """Check that the model can be served in the shape asked for, and return it with its path made absolute.

    A name that is no folder is taken for one on the Hugging Face hub: its config.json comes from the local
    cache, or from the hub unless HF_HUB_OFFLINE is set.
    Raises ConfigError when folder or config.json is missing, when attention heads or KV heads do not divide by
    `tensor_parallel`, or when `max_length` exceeds the model's context.
    """
    if model.inference_engine_config.engine == "echo":
        return model
    folder = Path(model.model_name_or_path).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"model_name_or_path='{folder}': the folder has no config.json")
        # Not resolved: compute nodes may know the folder only by the link.
        model = model.model_copy(update={"model_name_or_path": os.path.abspath(folder)})  # noqa: PTH100
    elif _may_be_on_hub(model.model_name_or_path):
        path = _from_hub(model.model_name_or_path)
    else:
        raise ConfigError(
            f"model_name_or_path='{model.model_name_or_path}': no such folder, and no name on the Hugging Face hub"
        )
    try:
        config = json.loads(path.read_text())
        described = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model_name_or_path='{model.model_name_or_path}': {path} is unreadable: {error}") from error
    _check_shape(model, described)
    if isinstance(model.tokenizer, str):
        model = model.model_copy(update={"tokenizer": _checked_tokenizer(model.tokenizer)})
    return model


def _checked_tokenizer(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return os.path.abspath(folder)  # noqa: PTH100 (as for the model's folder)
    if _may_be_on_hub(name):
        return name
    raise ConfigError(f"tokenizer='{name}': no such folder, and no name on the Hugging Face hub")


def _may_be_on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).name.startswith(".")


def _check_shape(model: ModelConfig, config: dict[str, Any]) -> None:
    tp = model.tensor_parallel
    heads, key_value_heads, context = (_first(config, names) for names in (_HEADS, _KEY_VALUE_HEADS, _CONTEXT))
    for kind, count in (("attention heads", heads), ("KV heads", key_value_heads)):
        if count is not None and count % tp:
            allowed = ", ".join(str(n) for n in range(1, count + 1) if _divides_all(n, heads, key_value_heads))
            raise ConfigError(
                f"tensor_parallel={tp}: does not divide the model's {count} {kind}; allowed are {allowed}"
            )
    if context is not None and model.max_length is not None and model.max_length > context:
        raise ConfigError(
            f"max_length={model.max_length}: the model's context is {context} tokens, and no more is allowed"
        )


def _divides_all(divisor: int, *counts: int | None) -> bool:
    return all(count is None or count % divisor == 0 for count in counts)


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _from_hub(name: str) -> Path:
    # Imported here because it takes a quarter of a second, and local folders do without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model_name_or_path='{name}': no such folder, and not to be had from the Hugging Face hub or its cache: "
            f"{reason}"
        ) from error
