"""The tensors of a checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mii_hpc.adapter import WEIGHTS, LowRank, read_adapter
from mii_hpc.config import ModelConfig
from mii_hpc.engine.model.dequantising import dequantised
from mii_hpc.engine.model.reading import Reader
from mii_hpc.engine.upload import upload_pages
from mii_hpc.errors import ConfigError
from mii_hpc.printable import listed
from mii_hpc.quantisation import Quantisation, find_packed
from mii_hpc.tensors import as_plain, read_headers


class Checkpoint:
    """The tensors of a checkpoint in safetensors files, read one at a time."""

    def __init__(self, model: ModelConfig, quantisation: Quantisation | None = None) -> None:
        self._folder = _folder(model.model_name_or_path)
        self._config: Any = None
        self._conversions: dict[str, _Conversion] = {}
        self._made_by: dict[str, _Conversion] = {}
        # What a conversion has made besides what was asked for.
        self._made: dict[str, torch.Tensor] = {}
        tensors = read_headers(self._folder)
        self._tensors = tensors
        self._ahead: Reader[torch.Tensor] | None = None
        self._packed = find_packed(tensors, quantisation)
        plain = as_plain(tensors, quantisation)
        self._names = sorted(plain, key=_by_number)
        if not self._names:
            raise ConfigError(
                f"{model.model_name_or_path} has no model.safetensors, which tensor_parallel above 1, "
                "quantization_mode and adapter need"
            )
        self._adapter = Path(model.adapter) if model.adapter is not None else Path()
        self._added = {} if model.adapter is None else read_adapter(self._adapter, plain)
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
        for stored in self._names:
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

        One that is quantised is returned as dequantised() makes it, one that an adapter changes in float32.
        """
        if stored in self._made_by:
            if stored not in self._made:
                self._made |= self._convert(self._made_by[stored], device)
            return self._made.pop(stored)
        if (packed := self._packed.get(stored)) is None:
            tensor = self._tensor(stored, device)
        else:
            tensor = dequantised(packed, {part: self._tensor(name, device) for part, name in packed.names.items()})
        if (low := self._added.get(stored)) is not None:
            tensor = self._with_added(tensor.float(), low)
            self._merged.add(stored)
        return tensor

    @contextmanager
    def reading(self, order: Iterable[str], device: torch.device) -> Iterator[None]:
        """Within this context tensors are read ahead, in the order in which read() will be asked for them, to a GPU.

        For a CPU files are mapped, where nothing is read before it is wanted: each tensor would map all of its file.
        """
        if device.type == "cpu":
            yield
            return
        parts = [(part, self._tensors[part].size) for stored in order for part in self._parts(stored)]
        self._ahead = Reader(lambda name: self._open(name, device), parts)
        try:
            yield
        finally:
            self._ahead.close()
            self._ahead = None

    def _parts(self, stored: str) -> list[str]:
        """Return the tensors in the files from which read() makes one."""
        if stored in self._made_by:
            return [part for source, _ in self._made_by[stored].sources for part in self._parts(source)]
        packed = self._packed.get(stored)
        return [stored] if packed is None else [*packed.names.values()]

    def refuse_unmerged(self) -> None:
        """Raise ConfigError, by name, if an adapter changes a weight that has not been read."""
        if unread := sorted(self._added.keys() - self._merged):
            shown = listed(unread, len(unread))
            raise ConfigError(f"adapter='{self._adapter}': it changes {shown}, which the architecture does not read")

    def changes_nothing(self, stored: str) -> bool:
        """Return whether a tensor is a bias of zeros, which some quantisers give to layers that have none."""
        stem, _, leaf = stored.rpartition(".")
        is_bias = leaf == "bias" and f"{stem}.weight" in self._packed
        return is_bias and not self._tensor(stored, torch.device("cpu")).any()

    def _with_added(self, weight: torch.Tensor, low: LowRank) -> torch.Tensor:
        def read(name: str) -> torch.Tensor:
            return _tensor(self._adapter / WEIGHTS, name, weight.device).float()

        added = low.scale * (read(low.b) @ read(low.a))
        weight = (weight.T if low.transposed else weight) + added
        if low.magnitude is not None:
            weight *= (read(low.magnitude) / weight.norm(dim=1)).unsqueeze(1)
        return weight.T if low.transposed else weight

    def _tensor(self, stored: str, device: torch.device) -> torch.Tensor:
        return self._open(stored, device) if self._ahead is None else self._ahead.read(stored)

    def _open(self, stored: str, device: torch.device) -> torch.Tensor:
        return _tensor(self._folder / self._tensors[stored].file, stored, device)

    def _convert(self, conversion: _Conversion, device: torch.device) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(conversion.converter)
        for stored, pattern in conversion.sources:
            converter.add_tensor(conversion.name, stored, pattern, self.read(stored, device))
        made = converter.convert(conversion.name, config=self._config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _tensor(file: Path, stored: str, device: torch.device) -> torch.Tensor:
    # Opened anew each time, so that no page of the file stays mapped.
    with safe_open(file, framework="pt") as opened:
        return upload_pages(opened.get_tensor(stored), device)


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
