"""Kernels of ours begin while the one before them still runs: NVIDIA's programmatic dependent launch.

A kernel that is launched so calls `follow` before it reads what another kernel has written, and before it writes: from
there on all before it have ended. What comes earlier, such as to read weights, is done meanwhile.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import triton
import triton.language as tl

DRIVER = 12030
"""CUDA graphs keep such launches from this version of the driver on."""


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Return whether kernels can be launched so there: from Hopper on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and _driver() >= DRIVER
        and hasattr(tl.extra.cuda, "gdc_wait")
    )


def _driver() -> int:
    """Return the newest CUDA that the driver knows, as 1000 * major + 10 * minor."""
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def launch_options(device: torch.device) -> dict[str, bool]:
    """Return how a kernel that calls `follow` is launched there: its own EARLY, and what Triton is to do."""
    return {"EARLY": True, "launch_pdl": True} if overlaps(device) else {"EARLY": False}


@triton.jit
def follow(EARLY: tl.constexpr) -> None:
    """Let the next kernel begin, and wait for the end of those before."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
