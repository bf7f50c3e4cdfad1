"""A weight that tensors make up."""

from collections.abc import Mapping
from typing import Any

import torch

from mii_hpc.engine.model.dequantising import dequantised
from mii_hpc.quantisation import Quantisation, find_packed
from mii_hpc.tensors import Tensor

DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip


def plain(tensors: Mapping[str, torch.Tensor], **about: Any) -> tuple[str, torch.Tensor]:
    """Return the name of the one weight that tensors make up, and the weight; `about` is what config.json says."""
    headers = {name: Tensor("", DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    ((name, packed),) = find_packed(headers, Quantisation.of({"quantization_config": about})).items()
    weight = dequantised(packed, {part: tensors[of] for part, of in packed.names.items()})
    assert packed.shape in (None, tuple(weight.shape))
    return name, weight
