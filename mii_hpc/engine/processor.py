"""What this host's processor computes well. Every choice that depends on its instruction set is made here.

With `ATEN_CPU_CAPABILITY=avx2` in the environment, a processor with AVX-512 counts as one without, for torch too.
"""

from __future__ import annotations

import platform

import torch


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of a dtype on this processor.

    On x86, bfloat16 needs AVX-512 or newer, and float16 needs AVX-512 FP16. AMD before Zen 4 and older Intel lack them.
    """
    if not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def serving_dtype(checkpoint: torch.dtype) -> torch.dtype:
    """Return the dtype in which a checkpoint is best served: its own, or float32 where that is not multiplied."""
    return checkpoint if multiplies(checkpoint) else torch.float32


def packed_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of the packed weights of linear layers that compute in `dtype`; None where none are packed.

    Where `dtype` is not multiplied, weights in float32 are the fastest. Measured on two cores with AVX2, bfloat16,
    2048 x 5632: 5 ms beside 10 for 16 rows, 60 beside 290 for 512; only a single row takes longer, 2.5 beside 0.6.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not multiplies(torch.float32):
        return None
    return serving_dtype(dtype)


def compiler_flag() -> str:
    """Return the compiler's flag for the instructions of this processor."""
    if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        return "-march=x86-64-v3"
    return "-march=native"
