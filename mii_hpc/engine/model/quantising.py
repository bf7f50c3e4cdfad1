"""Linear layers over weights of 8 or 4 bits, which are made of plain ones while a model loads: `quantization_mode`.

Rows, sums and all other layers stay as they are. On CPU a product of few rows reads the weights through a kernel that
is compiled at first use. Elsewhere, and without a compiler, a layer's weights are widened for each product, which saves
memory, not time.
"""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from mii_hpc.engine.extensions import compiled
from mii_hpc.engine.model.linears import Share, share_of, sum_with
from mii_hpc.engine.processor import serving_dtype

if TYPE_CHECKING:
    from mii_hpc.engine.model.peers import Peers

SOURCE = Path(__file__).with_name("quantising.cpp")
GROUP = 32
"""Inputs of one output that share a scale in int4; no mode takes a layer whose inputs are not a multiple of it."""
FP8 = torch.float8_e4m3fn
KERNEL_ROWS = 16
"""For more rows on CPU, widening the weights once for all costs less than what torch's product is faster."""
_IN_LAYERS = re.compile(r"\.\d+\.")
_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Layers that choose experts: small, and a wrong choice is a large error."""


class QuantisedLinear(nn.Module):
    """A linear layer, or a rank's share of one, over a quantised weight.

    It has no `weight`: a model that reads one itself fails, rather than compute with what it does not know.
    """

    def __init__(self, share: Share, mode: str) -> None:
        super().__init__()
        quantised, scales = _QUANTISE[mode](share.weight.float().contiguous())
        self.quantised = nn.Parameter(quantised, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = share.bias
        self._mode = mode
        self._group = share.group
        self._group_name = None if share.group is None else share.group.group_name
        self._inputs = share.inputs
        self.peers: Peers | None = None
        library = _library() if share.weight.device.type == "cpu" else None
        self._kernel: Any = None if library is None else getattr(library, f"product_{mode}")

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for rows [..., inputs]."""
        if self._inputs is not None:
            rows = rows[..., self._inputs]
        output = self._product(rows)
        if self._group_name is not None and rows.is_cuda:
            sum_with(self.peers, output, self._group_name)
        elif self._group_name is not None:
            from deepspeed import comm

            comm.inference_all_reduce(output, group=self._group)
        return output if self.bias is None else output + self.bias

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [outputs, inputs] in a plain dtype."""
        if self._mode != "int4":
            return self.quantised.to(dtype) * self.scales.to(dtype)
        outputs, groups = self.scales.shape[:2]
        halves = self.quantised.view(outputs, groups, GROUP // 2)
        step, lowest = torch.split(self.scales.to(dtype), 1, -1)
        steps = torch.cat([halves & 15, halves >> 4], -1).to(dtype)
        return torch.addcmul(lowest, steps, step).view(outputs, groups * GROUP)

    def _product(self, rows: torch.Tensor) -> torch.Tensor:
        if self._kernel is None or rows.shape[:-1].numel() > KERNEL_ROWS:
            dtype = rows.dtype if rows.is_cuda else serving_dtype(rows.dtype)
            return linear(rows.to(dtype), self.dequantised(dtype)).to(rows.dtype)
        wide = rows.float().contiguous()
        output = wide.new_empty(*rows.shape[:-1], len(self.scales))
        tensors = (wide, self.quantised, self.scales, output)
        self._kernel(*(tensor.data_ptr() for tensor in tensors), wide[..., 0].numel(), rows.shape[-1], len(self.scales))
        return output.to(rows.dtype)


def quantised(name: str, layer: nn.Module, mode: str) -> QuantisedLinear | None:
    """Return a layer, by its name in a module, over a quantised weight; None if it is to stay as it is.

    Embeddings and the head stay: errors there are in every token, and many models have one weight for both.
    """
    share = share_of(layer) if _IN_LAYERS.search(name) and name.rpartition(".")[2] not in _ROUTERS else None
    if share is None or not share.weight.numel() or share.weight.shape[1] % GROUP:
        return None
    return QuantisedLinear(share, mode)


def quantise_linears(module: nn.Module, mode: str) -> None:
    """Replace the linear layers of a module's layers by quantised ones."""
    for name, part in list(module.named_modules()):
        layer = quantised(name, part, mode)
        if layer is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, layer)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / _nonzero(scales)).round().to(torch.int8), scales


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / torch.finfo(FP8).max
    return (weight / _nonzero(scales)).to(FP8), scales


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two weights a byte [outputs, inputs / 2]; step and lowest weight of each group [outputs, groups, 2]."""
    groups = weight.view(len(weight), -1, GROUP)
    lowest = groups.amin(-1, keepdim=True).bfloat16()
    step = ((groups.amax(-1, keepdim=True) - lowest) / 15).bfloat16()
    steps = ((groups - lowest) / _nonzero(step.float())).round().clamp(0, 15).to(torch.uint8)
    low, high = torch.split(steps, GROUP // 2, -1)
    return (low | high << 4).flatten(1), torch.cat([step, lowest], -1)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """Return scales to divide by: of what is all zero, any will do."""
    return torch.where(scales == 0, 1, scales)


_QUANTISE = {"int8": _int8, "int4": _int4, "fp8": _fp8}


@cache
def _library() -> ctypes.CDLL | None:
    library = compiled(SOURCE)
    for mode in _QUANTISE if library is not None else ():
        function = getattr(library, f"product_{mode}")
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
        function.restype = None
    return library
