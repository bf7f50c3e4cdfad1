"""What the files of a checkpoint say of its tensors, alike on the login node and in the engine. Imports no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_hpc.errors import ConfigError

_QUANTISED_NAMES = re.compile(
    r"\.(weight_scale_inv|weight_scale|weight_packed|input_scale|qweight|qzeros|scales|g_idx|SCB|absmax"
    r"|quant_map|quant_state\.[^.]+|weight_format|\w+_blocks|\w+_scales)$"
)
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_LARGEST_HEADER = 100 * 2**20
"""Bytes, as the format bounds it."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_tensors(folder: Path, config: Mapping[str, Any], ranks: int) -> None:
    """Check what the files of a model's folder tell without reading any tensor.

    `config` is what config.json says, that of the text model included. A folder without weights passes.
    Raises ConfigError, naming file or tensor: for files that are cut short or missing, layers without tensors,
    quantised weights, an adapter, and for `.bin` files where several `ranks` are to read them.
    """
    where = f"model_name_or_path='{folder}'"
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            f"{where}: its weights are quantised (quant_method '{method}'), and only plain weights are served; take "
            "the checkpoint that it was made from"
        )
    tensors = read_headers(folder)
    _check_adapter(folder, bool(tensors) or bool(list(folder.glob("*.bin"))))
    if not tensors:
        if ranks > 1 and list(folder.glob("pytorch_model*.bin")):
            raise ConfigError(
                f"{where}: tensor_parallel={ranks} takes weights in safetensors files, and here are .bin files; "
                "convert them, or use tensor_parallel=1"
            )
        return
    for name, tensor in tensors.items():
        if _QUANTISED_NAMES.search(name):
            raise ConfigError(f"{where}: its weights are quantised: it has {name}, and only plain weights are served")
        if len(tensor.shape) > 1 and tensor.dtype not in _PLAIN_DTYPES and name.endswith("weight"):
            raise ConfigError(
                f"{where}: its weights are quantised: it has {name} as {tensor.dtype}, and only plain weights are "
                "served"
            )
    count = config.get("num_hidden_layers")
    numbers = {int(found[1]) for name in tensors if (found := _LAYER.search(name))}
    if isinstance(count, int) and numbers:
        missing = sorted(set(range(count)) - numbers)
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ConfigError(f"{where}: the checkpoint has no tensors of layer {shown}, of num_hidden_layers={count}")


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files by name, as their headers and the index say it.

    Raises ConfigError for a file that the index names and that is not there, lacks a tensor, or is cut short.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        whole = folder / "model.safetensors"
        return _header(whole) if whole.is_file() else {}
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is unreadable: {error}") from error
    headers = {}
    for name in sorted(set(files.values())):
        if not (folder / name).is_file():
            raise ConfigError(f"{index} names {name}, which is not there: the checkpoint is incomplete")
        headers[name] = _header(folder / name)
    for name, file in files.items():
        if name not in headers[file]:
            raise ConfigError(f"{folder / file} lacks {name}, which {index.name} says it has")
    return {name: headers[file][name] for name, file in files.items()}


def _header(path: Path) -> dict[str, Tensor]:
    """Return what a safetensors file has. The format: 8 bytes of length, that much JSON, then the tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError("it does not begin as such a file does")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}") from error
    if size < 8 + length + end:
        raise ConfigError(f"{path} is cut short: it has {size} bytes of {8 + length + end}")
    return found


def _check_adapter(folder: Path, has_weights: bool) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    of = f" of '{base}'" if base else ""
    if has_weights:
        raise ConfigError(
            f"model_name_or_path='{folder}': beside the weights lies an adapter{of}, which would not be used; merge it "
            "into them, or take adapter_config.json away"
        )
    raise ConfigError(
        f"model_name_or_path='{folder}': it has an adapter{of} alone; merge it into its base model, and serve that"
    )
