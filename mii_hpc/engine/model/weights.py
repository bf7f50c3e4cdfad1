"""The tensors of a checkpoint."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mii_hpc.adapter import WEIGHTS, read_adapter
from mii_hpc.config import ModelConfig
from mii_hpc.errors import ConfigError
from mii_hpc.printable import listed
from mii_hpc.tensors import Quantisation, find_scales, is_of_activations, read_headers


class Checkpoint:
    """The tensors of a checkpoint in safetensors files, read one at a time."""

    def __init__(self, model: ModelConfig, quantisation: Quantisation | None = None) -> None:
        self._folder = _folder(model.model_name_or_path)
        self._quantisation = quantisation
        self._config: Any = None
        self._conversions: dict[str, _Conversion] = {}
        self._made_by: dict[str, _Conversion] = {}
        # What a conversion has made besides what was asked for.
        self._made: dict[str, torch.Tensor] = {}
        tensors = read_headers(self._folder)
        self._all_files = {name: tensor.file for name, tensor in tensors.items()}
        self._scales = find_scales(tensors, quantisation)
        beside = {*self._scales.values(), *(name for name in tensors if quantisation and is_of_activations(name))}
        self._files = {name: file for name, file in self._all_files.items() if name not in beside}
        if not self._files:
            raise ConfigError(
                f"{model.model_name_or_path} has no model.safetensors, which tensor_parallel above 1, "
                "quantization_mode and adapter need"
            )
        self._adapter = Path(model.adapter) if model.adapter is not None else Path()
        self._added = {} if model.adapter is None else read_adapter(self._adapter, tensors)
        self._merged: set[str] = set()

    def names(self, module: Any) -> dict[str, str]:
        """Return under which name the file has each parameter of a module, or the one that it is tied to.

        The renaming is transformers' own. A parameter that is computed from stored ones, such as those of all experts
        in one, has its own name.
        """
        transforms = get_model_conversion_mapping(module)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        wanted = module.state_dict()
        found: dict[str, str] = {}
        self._config = module.config
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        for stored in sorted(self._files, key=_by_number):
            name, pattern = rename_source_key(stored, renamings, converters, module.base_model_prefix, wanted)
            if pattern is None:
                found[name] = stored
                continue
            converter = by_pattern[pattern]
            conversion = self._conversions.setdefault(name, _Conversion(converter, name))
            conversion.sources.append((stored, pattern))
            for target in converter.target_patterns:
                made = name.replace(converter.target_patterns[0], target)
                found[made] = made
                self._made_by[made] = conversion
        tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        for name, partner in tied.items():
            if partner in found:
                found.setdefault(name, found[partner])
        return found

    def read(self, stored: str, device: torch.device) -> torch.Tensor:
        """Return the tensor that names() calls so; on a GPU it comes there without a copy on the host.

        One that is quantised, or that an adapter is merged into, is returned in float32.
        """
        if stored in self._made_by:
            if stored not in self._made:
                self._made |= self._convert(self._made_by[stored], device)
            return self._made.pop(stored)
        tensor = _tensor(self._folder / self._all_files[stored], stored, device)
        if (beside := self._scales.get(stored)) is not None:
            scales = _tensor(self._folder / self._all_files[beside], beside, device).float()
            if beside.endswith(".SCB"):  # the largest weight of each output
                scales = scales / 127
            tensor = dequantised(tensor, scales, self._quantisation.block if self._quantisation else None)
        if (low := self._added.get(stored)) is not None:
            a, b = (_tensor(self._adapter / WEIGHTS, name, device).float() for name in (low.a, low.b))
            added = low.scale * (b @ a)
            tensor = tensor.float() + (added.T if low.transposed else added)
            self._merged.add(stored)
        return tensor

    def refuse_unmerged(self) -> None:
        """Raise ConfigError, by name, if an adapter changes a weight that has not been read."""
        if unread := sorted(self._added.keys() - self._merged):
            shown = listed(unread, len(unread))
            raise ConfigError(f"adapter='{self._adapter}': it changes {shown}, which the architecture does not read")

    def _convert(self, conversion: _Conversion, device: torch.device) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(conversion.converter)
        for stored, pattern in conversion.sources:
            converter.add_tensor(conversion.name, stored, pattern, self.read(stored, device))
        made = converter.convert(conversion.name, config=self._config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _tensor(file: Path, stored: str, device: torch.device) -> torch.Tensor:
    # Opened anew each time, so that no page of the file stays mapped.
    with safe_open(file, framework="pt", device=str(device)) as opened:
        tensor: torch.Tensor = opened.get_tensor(stored)
    return tensor


def dequantised(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Return a weight [outputs, inputs] times its scales, in float32.

    There is one for all of it, one for each output, or one for each `block` of rows and columns; the last blocks may be
    smaller. Without a `block` they are of one size.
    """
    if scales.dim() < 2:
        return weight.float() * scales.view(-1, 1)
    rows, columns = block or (weight.shape[0] // scales.shape[0], weight.shape[1] // scales.shape[1])
    if scales.shape[0] > 1:
        scales = scales.repeat_interleave(1 if len(scales) == len(weight) else rows, 0)[: len(weight)]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return weight.float() * scales


@dataclass
class _Conversion:
    """Parameters that transformers computes from stored tensors: (name, the pattern that it matches) of each."""

    converter: WeightConverter
    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them, as experts are numbered."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))


def refuse_missing(model: ModelConfig, missing: list[str]) -> None:
    """Raise ConfigError, by name, if a checkpoint lacks any tensors."""
    if missing:
        shown = listed(missing, len(missing))
        raise ConfigError(f"the checkpoint {model.model_name_or_path} lacks {shown}")


def refuse_left_over(model: ModelConfig, module: Any, left_over: list[str]) -> None:
    """Raise ConfigError, by name, if a checkpoint has tensors for parts of a module that know nothing of them.

    Without a scale or a bias that a layer should have, it answers wrongly. Whole parts that the module does not have,
    such as a vision tower, are none of its concern; and some tensors are left over in old checkpoints of a family.
    """
    harmless = [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(module._keys_to_ignore_on_load_unexpected or ())]
    parts = {name for name, part in module.named_modules() if part._parameters}
    buffers = {name for name, _ in module.named_buffers()}
    found = [
        name
        for name in left_over
        if name.rpartition(".")[0] in parts
        and name not in buffers
        and not any(re.search(pattern, name) for pattern in harmless)
    ]
    if found:
        shown = listed(found, len(found))
        raise ConfigError(
            f"the checkpoint {model.model_name_or_path} has {shown}, which the architecture does not know"
        )
