"""An adapter that is merged into a model as it loads: a LoRA folder as peft saves it, read without torch.

LoRA is https://arxiv.org/abs/2106.09685, DoRA https://arxiv.org/abs/2402.09353; the names, and which scale holds, are
peft's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_hpc.errors import ConfigError
from mii_hpc.printable import one_line
from mii_hpc.reading import read_bounded
from mii_hpc.tensors import Tensor, read_header

WEIGHTS = "adapter_model.safetensors"
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is."""
_FIELDS = (
    "alpha_pattern auto_mapping base_model_name_or_path bias exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type "
    "peft_version qalora_group_size r rank_pattern revision target_modules task_type use_dora use_rslora"
)
_KNOWN = frozenset(_FIELDS.split(" "))
"""Fields of adapter_config.json that say nothing more of how it is merged than is done here."""


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight [outputs, inputs]: `scale` times `b` [outputs, rank] times `a` [rank, inputs].

    With a `magnitude` [outputs] (DoRA), each output of the sum is then scaled to have that norm. `transposed` says that
    the weight is [inputs, outputs].
    """

    a: str
    b: str
    magnitude: str | None
    scale: float
    transposed: bool


def adapter_base(folder: Path) -> str | None:
    """Return which model a folder's adapter was made for, as far as it says so."""
    try:
        base = json.loads(read_bounded(folder / "adapter_config.json")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return base if isinstance(base, str) and base else None


def read_adapter(folder: Path, tensors: Mapping[str, Tensor | None] | None) -> dict[str, LowRank]:
    """Return what the adapter of a folder adds to the weights of a checkpoint, by their names.

    Without the checkpoint's `tensors` the names are those of the modules. Raises ConfigError for a folder that has no
    LoRA, for a kind of it that cannot be merged, and for one that does not fit the checkpoint.
    """
    where = f"adapter='{folder}'"
    try:
        config: Any = json.loads(read_bounded(folder / "adapter_config.json"))
        alphas = config.get("alpha_pattern") or {}
        alpha, by_root = _number(config["lora_alpha"]), bool(config.get("use_rslora"))
        patterns = [(re.compile(rf"(.*\.)?({pattern})$"), _number(value)) for pattern, value in alphas.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ConfigError(f"{where}: adapter_config.json is none of a LoRA: {one_line(error)}") from None
    _refuse_other_kinds(where, config)
    is_dora = config.get("use_dora") is True
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{where}: the folder has no {WEIGHTS}")
    found: dict[str, dict[str, str]] = {}
    header = read_header(folder / WEIGHTS)
    for name in header:
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_(?:([AB])\.weight|(magnitude)_vector(?:\.weight)?)", name
        )
        if match is None:
            raise ConfigError(f"{where}: it has {one_line(name)}, which is no part of a LoRA")
        found.setdefault(match[1], {})[match[2] or match[3]] = name
    added = {}
    for module, parts in found.items():
        a, b = (header.get(parts.get(part, ""), Tensor("", "", ())) for part in "AB")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
            raise ConfigError(f"{where}: lora_A and lora_B of {one_line(module)} do not fit each other")
        magnitude = parts.get("magnitude")
        if (magnitude is not None) != is_dora or (magnitude and header[magnitude].shape != (b.shape[0],)):
            has = "no" if magnitude is None else "an unexpected"
            raise ConfigError(f"{where}: {one_line(module)} has {has} magnitude, and use_dora={is_dora}")
        rank = a.shape[0]
        own = next((value for pattern, value in patterns if pattern.match(module)), alpha)
        scale = own / (rank**0.5 if by_root else rank)
        low = LowRank(parts["A"], parts["B"], magnitude, scale, config.get("fan_in_fan_out") is True)
        weight = f"{module}.weight"
        if tensors is not None:
            weight = _stored(where, weight, tensors)
            shape = (b.shape[0], a.shape[1])[:: -1 if low.transposed else 1]
            if (base := tensors[weight]) is not None and base.shape != shape:
                raise ConfigError(
                    f"{where}: it is for {one_line(weight)} of the shape {list(shape)}, and the model's is "
                    f"{list(base.shape)}"
                )
        added[weight] = low
    if not added:
        raise ConfigError(f"{where}: {WEIGHTS} is empty")
    return added


def _stored(where: str, weight: str, tensors: Mapping[str, Tensor | None]) -> str:
    """Return under which name the checkpoint has a weight: one of the two may have a prefix that the other lacks."""
    if weight in tensors:
        return weight
    alike = [name for name in tensors if name.endswith(f".{weight}") or weight.endswith(f".{name}")]
    if len(alike) != 1:
        raise ConfigError(f"{where}: it changes {one_line(weight)}, and the model has no such weight")
    return alike[0]


def _refuse_other_kinds(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"{where}: peft_type='{one_line(kind)}': only 'LORA' can be merged")
    if (start := config.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights='{one_line(start)}' has changed the base model as well; save the adapter as a "
            "plain LoRA"
        )
    other = {name for name, value in config.items() if value and name not in _KNOWN}
    if config.get("bias", "none") != "none":
        other.add("bias")
    if other:
        name = min(other)
        raise ConfigError(
            f"{where}: {one_line(name)}={one_line(config[name])}: cannot be merged; only a LoRA or a DoRA can"
        )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a scale is no number")
    return float(value)
