"""Weights in the layout that oneDNN computes with, so that it does not rearrange them in every step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from mii_hpc.engine.model.linears import share_of
from mii_hpc.engine.processor import packed_dtype
from mii_hpc.heap import trim_heap

# The layout is chosen for this many rows: decode steps have few, and for many the choice makes no difference.
ROWS = 16


class PackedLinear(nn.Module):
    """A linear layer, or a rank's share of one, over a packed weight, which may be of another dtype than its rows.

    Measured at 16 rows: 0.5 to 0.7 of the plain layer's time in bfloat16, 0.3 to 0.6 in float32.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, group: Any = None, inputs: slice | None = None
    ) -> None:
        """With a `group`, its ranks' products are added up before the bias is; `inputs` are those of this rank.

        The layer computes, and adds up, in the dtype of `weight`.
        """
        super().__init__()
        # DeepSpeed gives a rank nothing of a layer that is too small to cut; there is nothing to pack then.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if weight.numel() else weight
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        self._group = group
        self._inputs = inputs

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for rows [..., inputs]."""
        if self._inputs is not None:
            rows = rows[..., self._inputs].contiguous()
        output = _product(rows.to(self.weight.dtype), self.weight, self.bias if self._group is None else None)
        if self._group is not None:
            from deepspeed import comm

            comm.inference_all_reduce(output, group=self._group)
            if self.bias is not None:
                output.add_(self.bias)
        return output.to(rows.dtype)


def pack_linears(module: nn.Module) -> None:
    """Replace the linear layers of a module on CPU by packed ones, one at a time.

    The plain weights are dropped as it goes, so that no memory is taken twice, but for one layer's. Weights that
    another layer uses as well, such as a head that is tied to the embeddings, stay as they are.
    """
    owners = Counter(id(parameter) for part in module.modules() for parameter in part._parameters.values())
    # Only names are listed: a list of the layers would hold on to their plain weights.
    for part in [part for part in module.modules() if part._modules]:
        replaced = False
        for name in [name for name, _ in part.named_children()]:
            packed = _packed(part._modules[name], owners)
            if packed is not None:
                setattr(part, name, packed)
                replaced = True
        if replaced:
            # A packed weight does not fit into the hole that a plain one of the same size has left.
            trim_heap()


def _packed(layer: Any, owners: Counter[int]) -> PackedLinear | None:
    """Return the same layer over a packed weight, or None if it is to stay as it is."""
    share = share_of(layer)
    if share is None or share.weight.device.type != "cpu" or owners[id(share.weight)] > 1:
        return None
    dtype = packed_dtype(share.weight.dtype)
    return None if dtype is None else PackedLinear(share.weight.to(dtype), share.bias, share.group, share.inputs)


def rounded(count: int) -> int:
    """Return for how many rows a product is computed that is wanted for `count`: at most an eighth more.

    oneDNN compiles one for each number of rows and shape of weight and keeps up to 1,024 of them, 0.6 MiB each.
    """
    if count <= ROWS:
        return count
    unit = 1 << ((count - 1).bit_length() - 4)
    return -(-count // unit) * unit


def _product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not weight.numel():
        return linear(rows, weight, bias)
    flat = rows.reshape(-1, rows.shape[-1])
    count = len(flat)
    padded = pad(flat, (0, 0, 0, rounded(count) - count))
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return output[:count].view(*rows.shape[:-1], output.shape[-1])
