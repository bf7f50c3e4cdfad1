"""What the files of a checkpoint say of its tensors, alike on the login node and in the engine. Imports no torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_hpc.errors import ConfigError
from mii_hpc.printable import listed, one_line
from mii_hpc.quantisation import Quantisation, find_packed, is_of_activations
from mii_hpc.reading import read_bounded

_EMBEDDINGS = re.compile(r"(language_model\.)?(model\.)?(language_model\.)?embed_tokens\.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,9})\.")
_LARGEST_HEADER = 16 * 2**20
"""Bytes; a header has some 120 for each tensor."""
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers reads weights from, or finds their files by."""
INDEX_BYTES = 32 * 2**20
"""No index is longer."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file of the folder: its dtype as safetensors names it, its shape, and its size in bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    size: int = 0


def as_plain(tensors: Mapping[str, Tensor], quantisation: Quantisation | None) -> dict[str, Tensor | None]:
    """Return the tensors of a checkpoint as a model has them, quantised weights made plain.

    None stands for a weight whose shape its headers do not tell. Raises ConfigError as find_packed() does.
    """
    packed = find_packed(tensors, quantisation)
    used = {name for weight in packed.values() for name in weight.names.values()}
    plain: dict[str, Tensor | None] = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not (quantisation is not None and is_of_activations(name))
    }
    return plain | {
        name: None if weight.shape is None else Tensor("", "F32", weight.shape) for name, weight in packed.items()
    }


def check_tensors(folder: Path, config: Mapping[str, Any], ranks: int, quantization_mode: str | None = None) -> None:
    """Check what the files of a model's folder tell without reading any tensor.

    `config` is what config.json says, that of the text model included.
    Raises ConfigError, naming file or tensor: for files that are cut short or missing, layers without tensors,
    embeddings of another shape than `config` says, weights that are quantised in a way that is not read, an adapter,
    and for `.bin` files where several `ranks` or a `quantization_mode` are to read them.
    """
    where = f"model_name_or_path='{folder}'"
    quantisation = Quantisation.of(config)
    stored = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if stored is None:
        raise ConfigError(f"{where}: the folder has no weights: one of {', '.join(_WEIGHTS)}")
    _check_adapter(folder)
    if ".bin" in stored:
        unread = {
            "a quantised checkpoint": quantisation is not None,
            f"tensor_parallel={ranks}": ranks > 1,
            f"quantization_mode='{quantization_mode}'": quantization_mode is not None,
        }
        asked = next((field for field, is_asked in unread.items() if is_asked), None)
        if asked is not None:
            raise ConfigError(f"{where}: {asked} takes weights in safetensors files, and here is {stored}; convert it")
        return
    tensors = read_headers(folder)
    find_packed(tensors, quantisation)
    _check_embeddings(where, tensors, config)
    count = config.get("num_hidden_layers")
    numbers = {int(found[1]) for name in tensors if (found := _LAYER.search(name))}
    if isinstance(count, int) and numbers:
        absent = count - sum(number < count for number in numbers)
        if absent > 0:
            shown = listed((number for number in range(count) if number not in numbers), absent)
            raise ConfigError(f"{where}: the checkpoint has no tensors of layer {shown}, of num_hidden_layers={count}")


def read_headers(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files by name, as their headers and the index say it.

    Raises ConfigError for a file that the index names and that is not there, lacks a tensor, or is cut short.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        whole = folder / "model.safetensors"
        return read_header(whole) if whole.exists() else {}
    try:
        files: dict[str, str] = json.loads(read_bounded(index, INDEX_BYTES))["weight_map"]
        names = sorted(set(files.values()))
        if not all(isinstance(name, str) and name.isprintable() and Path(name).name == name for name in names):
            raise ValueError("it names what is no file of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} is unreadable: {one_line(error)}") from None
    headers = {}
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(f"{index} names {name}, which is not there: the checkpoint is incomplete")
        headers[name] = read_header(folder / name)
    for name, file in files.items():
        if name not in headers[file]:
            raise ConfigError(f"{folder / file} lacks {one_line(name)}, which {index.name} says it has")
    return {name: headers[file][name] for name, file in files.items()}


def read_header(path: Path) -> dict[str, Tensor]:
    """Return what a safetensors file has. The format: 8 bytes of length, that much JSON, then the tensors.

    It is believed only where its tensors fit into the file as they say.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError("it does not begin as such a file does")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {name: _tensor(path.name, **entry) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ConfigError(f"{path} is no safetensors file: {one_line(error)}") from None
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < 8 + length + end:
        raise ConfigError(f"{path} is cut short: it has {size} bytes of {8 + length + end}")
    if (held := sum(tensor.size for tensor in found.values())) != end:
        raise ConfigError(f"{path} is no safetensors file: its tensors have {held} bytes, and share {end}")
    return found


def _tensor(file: str, dtype: Any, shape: Any, data_offsets: Any) -> Tensor:
    begin, end = data_offsets
    numbers = (*shape, begin, end)
    written = re.fullmatch(r"[A-Z]+(\d{1,3})?(_[A-Z0-9]+)?", dtype)
    if written is None or len(shape) > 16:
        raise ValueError("a tensor has no dtype, or no shape")
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or begin > end:
        raise ValueError("the shape or the place of a tensor is none")
    bits = int(written[1] or 8)
    if math.prod(shape) * bits != 8 * (end - begin):
        raise ValueError(f"a tensor of {dtype} and the shape {shape} is said to have {end - begin} bytes")
    return Tensor(file, dtype, tuple(shape), end - begin)


def _check_embeddings(where: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    said = tuple(config.get(name) for name in ("vocab_size", "hidden_size"))
    for name, tensor in tensors.items():
        if all(type(size) is int for size in said) and _EMBEDDINGS.fullmatch(name) and tensor.shape != said:
            raise ConfigError(
                f"{where}: the checkpoint has {one_line(name)} as {list(tensor.shape)}, and config.json says "
                f"vocab_size={said[0]} and hidden_size={said[1]}"
            )


def _check_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model_name_or_path='{folder}': beside the weights lies an adapter, which would not be used; move it to a "
            "folder of its own and name that with `adapter`, or take adapter_config.json away"
        )
