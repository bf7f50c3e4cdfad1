"""What can be known of a model before any of its weights are read. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

from mii_hpc.adapter import adapter_base, read_adapter
from mii_hpc.architecture import Architecture, check_type
from mii_hpc.config import MIIWarning, ModelConfig
from mii_hpc.errors import ConfigError
from mii_hpc.printable import one_line
from mii_hpc.quantisation import Quantisation
from mii_hpc.reading import read_bounded
from mii_hpc.tensors import as_plain, check_tensors, read_headers

_TOKENIZERS = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken", "*.tokenizer", "tekken.json")
"""Files of which any tokenizer has at least one."""
CONFIG_BYTES = 8 * 2**20
"""No config.json is longer."""


def check_model(model: ModelConfig) -> ModelConfig:
    """Check that the model can be served in the shape asked for, and return it with its path made absolute.

    A name that is no folder is taken for one on the Hugging Face hub: its config.json comes from the local
    cache, or from the hub unless HF_HUB_OFFLINE is set; its weights are looked at where the cache has them, or must.
    Raises ConfigError when folder, config.json, or tokenizer are missing, for an architecture that is not served, when
    attention heads or KV heads do not divide by `tensor_parallel`, when `max_length` exceeds the model's context, and
    for what check_tensors() refuses.
    """
    if model.inference_engine_config.engine == "echo":
        return model
    folder = Path(model.model_name_or_path).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file() and (folder / "adapter_config.json").is_file():
            base = adapter_base(folder)
            of, its = (f" of '{one_line(base)}'", f"'{one_line(base)}'") if base else ("", "its base model")
            raise ConfigError(
                f"model_name_or_path='{folder}': it has an adapter{of} alone; serve {its} with adapter='{folder}'"
            )
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
        config = json.loads(read_bounded(path, CONFIG_BYTES))
        described = {**config, **(config.get("text_config") or {})}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        words = f"{path} is unreadable: {one_line(error)}"
        raise ConfigError(f"model_name_or_path='{model.model_name_or_path}': {words}") from None
    architecture = Architecture.read(described.get)
    architecture.check_served()
    architecture.check_tensor_parallel(model.tensor_parallel)
    check_type(config, model.trust_remote_code)
    quantisation = Quantisation.of(described)
    if folder.is_dir() or _is_cached(path.parent):
        check_tensors(path.parent, described, model.tensor_parallel, model.quantization_mode)
        if model.tokenizer is None:
            _check_has_tokenizer(path.parent, "model_name_or_path")
    if architecture.context is not None and model.max_length is not None and model.max_length > architecture.context:
        raise ConfigError(
            f"max_length={model.max_length}: the model's context is {architecture.context} tokens, and no more is "
            "allowed"
        )
    if model.adapter is not None:
        model = model.model_copy(update={"adapter": _checked_adapter(model, folder, quantisation)})
    if isinstance(model.tokenizer, str):
        model = model.model_copy(update={"tokenizer": _checked_tokenizer(model.tokenizer)})
    return model


def _checked_adapter(model: ModelConfig, base: Path, quantisation: Quantisation | None) -> str:
    folder = Path(str(model.adapter)).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"adapter='{model.adapter}': no such folder")
    tensors = as_plain(read_headers(base), quantisation) if base.is_dir() else None
    if tensors is not None and not tensors:
        raise ConfigError(f"adapter='{folder}': takes a model with weights in safetensors files")
    read_adapter(folder, tensors)
    made_for = adapter_base(folder)
    if made_for and Path(made_for).name.lower() != Path(model.model_name_or_path).name.lower():
        warnings.warn(
            f"adapter='{folder}': it was made for '{one_line(made_for)}', and is merged into "
            f"'{model.model_name_or_path}'",
            MIIWarning,
            stacklevel=2,
        )
    return os.path.abspath(folder)  # noqa: PTH100 (as for the model's folder)


def _checked_tokenizer(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_has_tokenizer(folder, "tokenizer")
        return os.path.abspath(folder)  # noqa: PTH100 (as for the model's folder)
    if _may_be_on_hub(name):
        return name
    raise ConfigError(f"tokenizer='{name}': no such folder, and no name on the Hugging Face hub")


def _check_has_tokenizer(folder: Path, field: str) -> None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ConfigError(
            f"{field}='{folder}': the folder has no tokenizer, such as tokenizer.json; `tokenizer` takes a folder that "
            "has one"
        )


def _may_be_on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).name.startswith(".")


def _is_cached(snapshot: Path) -> bool:
    """Return whether a model of the hub has its weights in the cache, or there is no other place for them."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE or (snapshot / "model.safetensors").is_file()


def _from_hub(name: str) -> Path:
    # Imported here because it takes a quarter of a second, and local folders do without.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model_name_or_path='{name}': no such folder, and neither the Hugging Face hub nor its cache gives it: "
            f"{reason}"
        ) from error
