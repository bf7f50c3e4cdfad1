"""How the weights of a checkpoint are quantised, as config.json and the headers of its tensors tell it.

Imports no torch; mii_hpc.engine.model.dequantising has the formulas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mii_hpc.errors import ConfigError
from mii_hpc.printable import one_line, shown

if TYPE_CHECKING:
    from mii_hpc.tensors import Tensor

METHODS = ("awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "mxfp4")
"""Values of `quant_method` that are read."""
_QUANTISED_NAMES = re.compile(
    r"\.(weight_packed|weight_zero_point|weight_shape|qweight|qzeros|scales|(weight_)?g_idx|(nested_)?absmax"
    r"|(nested_)?quant_map|quant_state\.[^.]+|\w+_blocks|\w*global_scale|(input|activation|k|v)_scale|SCB"
    r"|weight_format)$"
)
_SCALES_OF = re.compile(r"(.+)_scale(s|_inv)?")
"""Scales of the tensor of that name; some models have parameters of their own that are called so."""
_PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
_SCALES = {
    ("fp8", "F8_E4M3"): "weight_scale_inv",
    ("fbgemm_fp8", "F8_E4M3"): "weight_scale",
    ("compressed-tensors", "F8_E4M3"): "weight_scale",
    ("compressed-tensors", "I8"): "weight_scale",
    ("bitsandbytes", "I8"): "SCB",
}
"""Which tensor beside `weight` has its scales, by the method and the dtype of the weight."""
_OF_ACTIVATIONS = re.compile(r"\.(input_scale|activation_scale|k_scale|v_scale|weight_format)$")
"""What says how rows and the KV cache are to be quantised, which stay as they are."""
_UNREAD = "the checkpoint's weights are quantised in a way that is not read"


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised, as config.json says it.

    Attributes:
        method: one of METHODS.
        block: how many rows and columns share a scale, if given.
        bits: of a weight, if given; with GPTQ some layers may have others.
        zero_offset: what is added to a stored zero point: GPTQ's first format stores one less.
    """

    method: str
    block: tuple[int, int] | None = None
    bits: int | None = None
    zero_offset: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """Return that of a config.json, None for plain weights. Raises ConfigError for one that is not read."""
        given = config.get("quantization_config") or config.get("compression_config")
        if not given:
            return None
        given = given if isinstance(given, Mapping) else {"quant_method": given}
        method = given.get("quant_method", given.get("method", "unknown"))
        unread = next(((field, value) for field, value, read in _fields(given, method) if value not in read), None)
        if unread is None and config.get("model_type") == "gpt2":  # its layers have the inputs first
            unread = ("model_type", "gpt2")
        if unread is not None:
            field, value = unread
            raise ConfigError(
                f"{field}={shown(value)}: {_UNREAD}; {', '.join(METHODS)} are, as the documentation says; take a "
                "checkpoint of plain weights"
            )
        block = given.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
        ):
            raise ConfigError(f"weight_block_size={one_line(block)}: must be two numbers, the rows and the columns")
        offset = int(method == "gptq" and _layout(given) != "gptq_v2")
        return cls(method, None if block is None else (block[0], block[1]), given.get("bits"), offset)


def _fields(given: Mapping[str, Any], method: Any) -> list[tuple[str, Any, Sequence[Any]]]:
    """Return what of a quantisation's description matters: each field, its value, and the values that are read."""
    fields: list[tuple[str, Any, Sequence[Any]]] = [("quant_method", method, METHODS)]
    if method == "gptq":
        fields += [
            ("checkpoint_format", _layout(given), (None, "gptq", "gptq_v2")),
            ("is_marlin_format", given.get("is_marlin_format") or False, (False,)),
            ("bits", given.get("bits"), (2, 3, 4, 8)),
            ("pack_dtype", given.get("pack_dtype"), (None, "int32")),
            ("adapter", given.get("adapter") or None, (None,)),
            ("rotation", given.get("rotation") or None, (None,)),
        ]
    elif method == "awq":
        fields += [
            ("version", _layout(given), (None, "gemm")),
            ("backend", "llm-awq" if given.get("backend") == "llm-awq" else None, (None,)),
            ("bits", given.get("bits"), (None, 4)),
        ]
    elif method == "compressed-tensors":
        groups = given.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            form = _under(group, "format") or given.get("format")
            bits = (None, 4, 8) if form == "pack-quantized" else (None, 8)
            fields += [
                ("format", form, _INTEGER_FORMATS),
                ("num_bits", _under(_under(group, "weights"), "num_bits"), bits),
            ]
        fields += [
            ("transform_config", given.get("transform_config") or None, (None,)),
            ("sparsity_config.format", _under(given.get("sparsity_config"), "format"), (None, "dense")),
        ]
    return fields


_INTEGER_FORMATS = (None, "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


def _layout(given: Mapping[str, Any]) -> Any:
    """Return how a quantisation says that tensors are laid out: the field has had three names."""
    names = ("checkpoint_format", "format", "version")
    found = next((given[name] for name in names if given.get(name)), None)
    return found.lower() if isinstance(found, str) else found


def _under(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


@dataclass(frozen=True)
class Packed:
    """A weight that several tensors make up.

    Attributes:
        form: which formula, by its name in mii_hpc.engine.model.dequantising.
        names: the names of the tensors in the checkpoint, by what each is.
        shape: of the weight in the model; None where only the content of the tensors tells it.
        bits: of a weight; where None, the content of the tensors tells it.
        quantisation: what config.json says.
    """

    form: str
    names: Mapping[str, str]
    shape: tuple[int, ...] | None
    bits: int | None
    quantisation: Quantisation


def find_packed(tensors: Mapping[str, Tensor], quantisation: Quantisation | None) -> dict[str, Packed]:
    """Return the quantised weights of a checkpoint, by the names that a model has for them.

    Raises ConfigError, by name, for tensors that are missing, left over, or of a shape that does not fit, and for
    weights that are quantised otherwise than config.json says.
    """
    found: dict[str, Packed] = {}
    for name, tensor in tensors.items():
        parts = _parts(name, tensor, tensors, quantisation) if quantisation is not None else None
        if parts is not None and quantisation is not None:
            weight, form, names = parts
            found[weight] = _packed(form, names, tensors, quantisation)
    used = {name for packed in found.values() for name in packed.names.values()}
    for name, tensor in tensors.items():
        activations = quantisation is not None and is_of_activations(name)
        scaled = _SCALES_OF.fullmatch(name)
        is_scale = scaled is not None and scaled[1] in tensors
        is_small = tensor.dtype.startswith("F8") or (
            len(tensor.shape) > 1 and tensor.dtype not in _PLAIN_DTYPES and name.endswith(".weight")
        )
        if (is_small or is_scale or _QUANTISED_NAMES.search(name)) and name not in used and not activations:
            raise ConfigError(f"{_UNREAD}: it has {one_line(name)} as {tensor.dtype}")
    return found


def is_of_activations(name: str) -> bool:
    """Return whether a tensor of a quantised checkpoint says nothing of its weights."""
    return _OF_ACTIVATIONS.search(name) is not None


def _parts(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], quantisation: Quantisation
) -> tuple[str, str, dict[str, str]] | None:
    """Return, if this is the main tensor of a quantised weight, the weight's name, its form, and its tensors' names."""
    method = quantisation.method
    stem, _, leaf = name.rpartition(".")
    if method in ("gptq", "awq") and leaf == "qweight":
        names = {part: f"{stem}.{part}" for part in ("qweight", "qzeros", "scales")}
        if f"{stem}.g_idx" in tensors:
            names["g_idx"] = f"{stem}.g_idx"
        return f"{stem}.weight", method, names
    if method == "compressed-tensors" and leaf == "weight_packed":
        names = {part: f"{stem}.{part}" for part in (leaf, "weight_scale", "weight_shape")}
        if f"{stem}.weight_zero_point" in tensors:
            names["weight_zero_point"] = f"{stem}.weight_zero_point"
        return f"{stem}.weight", "integers", names
    if method == "mxfp4" and leaf.endswith("_blocks"):
        weight = name.removesuffix("_blocks")
        return weight, method, {"blocks": name, "scales": f"{weight}_scales"}
    if method == "bitsandbytes" and f"{name}.quant_map" in tensors:
        kind = "nf4" if f"{name}.quant_state.bitsandbytes__nf4" in tensors else "fp4"
        names = {"weight": name, "state": f"{name}.quant_state.bitsandbytes__{kind}"}
        nested = ("nested_absmax", "nested_quant_map") if f"{name}.nested_absmax" in tensors else ()
        return name, "four_bits", names | {part: f"{name}.{part}" for part in ("absmax", "quant_map", *nested)}
    scales = _SCALES.get((method, tensor.dtype))
    if leaf == "weight" and scales is not None and len(tensor.shape) == 2:
        return name, "scaled", {"weight": name, "scales": f"{stem}.{scales}"}
    return None


def _packed(form: str, names: dict[str, str], tensors: Mapping[str, Tensor], quantisation: Quantisation) -> Packed:
    for name in names.values():
        if name not in tensors:
            main = next(iter(names.values()))
            raise ConfigError(f"the checkpoint lacks {one_line(name)}: {one_line(main)} is {tensors[main].dtype}")
    parts = {part: tensors[name] for part, name in names.items()}
    is_right = all(part.dtype in _DTYPES[form].get(of, _PLAIN_DTYPES) for of, part in parts.items())
    fit = _FITS[form](parts, quantisation) if is_right else None
    if fit is None:
        has = ", ".join(
            f"{one_line(name)} as {tensors[name].dtype} {list(tensors[name].shape)}" for name in names.values()
        )
        raise ConfigError(f"the checkpoint has {has}, which do not fit each other")
    return Packed(form, names, fit[0], fit[1], quantisation)


_DTYPES: dict[str, dict[str, tuple[str, ...]]] = {
    "scaled": {"weight": ("F8_E4M3", "I8")},
    "gptq": {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32",)},
    "awq": {"qweight": ("I32",), "qzeros": ("I32",), "g_idx": ("I32",)},
    "integers": {"weight_packed": ("I32",), "weight_shape": ("I64", "I32"), "weight_zero_point": ("I32",)},
    "mxfp4": {"blocks": ("U8",), "scales": ("U8",)},
    "four_bits": {"weight": ("U8", *_PLAIN_DTYPES), "state": ("U8",), "absmax": ("U8", "F32")},
}
"""Of each form, which dtypes each tensor may have, where it is not a plain one."""
_Fit = tuple[tuple[int, ...] | None, int | None] | None


def _fit_scaled(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take one scale for all of a weight, for each output, or for each block."""
    outputs, inputs = parts["weight"].shape
    scales = parts["scales"].shape
    fits = scales in ((), (1,), (outputs,), (outputs, 1), (1, 1))
    if not fits and len(scales) == 2 and 0 not in scales:
        if quantisation.block is not None:
            rows, columns = quantisation.block
            fits = scales == (-(-outputs // rows), -(-inputs // columns))
        else:
            fits = outputs % scales[0] == 0 and inputs % scales[1] == 0
    return ((outputs, inputs), 8) if fits else None


def _fit_gptq(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take qweight [inputs in words, outputs], qzeros [groups, outputs in words], and scales [groups, outputs]."""
    qweight, qzeros, scales = (parts[part].shape for part in ("qweight", "qzeros", "scales"))
    if not len(qweight) == len(qzeros) == len(scales) == 2 or 0 in (*qweight, *scales):
        return None
    groups, outputs = scales
    for bits in (quantisation.bits, 4, 8, 2, 3):
        inputs = qweight[0] * 32 // bits if bits else 0
        grouped = parts["g_idx"].shape == (inputs,) if "g_idx" in parts else inputs % groups == 0
        if (
            bits
            and grouped
            and qzeros == (groups, _words(outputs, bits))
            and qweight == (_words(inputs, bits), outputs)
        ):
            return (outputs, inputs), bits
    return None


def _fit_awq(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take qweight [inputs, outputs in words], qzeros [groups, outputs in words], and scales [groups, outputs]."""
    qweight, qzeros, scales = (parts[part].shape for part in ("qweight", "qzeros", "scales"))
    if not len(qweight) == len(qzeros) == len(scales) == 2 or 0 in (*qweight, *scales) or "g_idx" in parts:
        return None
    (groups, outputs), inputs = scales, qweight[0]
    fits = outputs % 8 == inputs % groups == 0 and qweight[1] == outputs // 8 and qzeros == (groups, outputs // 8)
    return ((outputs, inputs), 4) if fits else None


def _fit_integers(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take what has two dimensions; how many bits a weight has only the content of weight_shape tells."""
    weight, scales, shape = (parts[part].shape for part in ("weight_packed", "weight_scale", "weight_shape"))
    return (None, None) if len(weight) == len(scales) == 2 and 0 not in scales and shape == (2,) else None


def _fit_mxfp4(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take blocks [experts, outputs, groups, 16 bytes] and scales [experts, outputs, groups]."""
    blocks, scales = parts["blocks"].shape, parts["scales"].shape
    if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
        return None
    experts, outputs, groups = scales
    return (experts, groups * 32, outputs), 4


def _fit_four_bits(parts: Mapping[str, Tensor], quantisation: Quantisation) -> _Fit:
    """Take sixteen values, and two weights a byte; the state says of which shape."""
    is_nested = parts["absmax"].dtype == "U8"
    fits = parts["quant_map"].shape == (16,) and is_nested == ("nested_absmax" in parts)
    return (None, 4) if fits and (not is_nested or parts["nested_quant_map"].shape == (256,)) else None


def _words(numbers: int, bits: int) -> int:
    """Return how many words of 32 bits hold so many numbers."""
    return -(-numbers * bits // 32)


_FITS: dict[str, Callable[[Mapping[str, Tensor], Quantisation], _Fit]] = {
    "scaled": _fit_scaled,
    "gptq": _fit_gptq,
    "awq": _fit_awq,
    "integers": _fit_integers,
    "mxfp4": _fit_mxfp4,
    "four_bits": _fit_four_bits,
}
"""Of each form, what returns the shape and the bits of a weight, or None where its tensors do not fit each other."""
