"""Kernels of ours begin while the one before them still runs: NVIDIA's programmatic dependent launch.

A kernel that is launched so calls `follow` before it reads what another kernel has written, and before it writes: from
there on all before it have ended. What comes earlier, such as to read weights, is done meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def compiled_kernels_follow(device: torch.device) -> Iterator[None]:
    """Within this context the kernels that torch.compile makes for a device begin early too, where they can.

    Inductor can do that, but its kernels wait only where they read what the kernel before has written. That is not
    enough after a kernel that lets the next one begin before it has waited itself, as ours do.
    """
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel

    if not overlaps(device) or not all(hasattr(TritonKernel, hook) for hook in HOOKS):
        yield
        return
    plain = {hook: getattr(TritonKernel, hook) for hook in HOOKS}
    for hook, changed in HOOKS.items():
        setattr(TritonKernel, hook, changed)
    # Kernels that are kept on disk are those of this file.
    tag = torch.compiler.config.cache_key_tag + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    try:
        with (
            config.patch({"triton.enable_pdl": True}),
            torch.compiler.config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        ):
            yield
    finally:
        for hook, function in plain.items():
            setattr(TritonKernel, hook, function)


def _before_access(kernel: Any, buffer: Any, *_: Any, **__: Any) -> None:
    """Write what `follow` does into the source of a kernel."""
    if kernel._enable_pdl_codegen():
        if kernel.inside_reduction and kernel.range_trees[-1].is_loop:
            buffer = kernel.body  # before the loop
        buffer.writeline(kernel.GDC_LAUNCH)
        buffer.writeline(kernel.GDC_WAIT)


def _after_load(kernel: Any, *_: Any) -> None:
    pass


def _keep_first(kernel: Any, code: Any) -> None:
    """Leave it only where it comes first."""
    known: set[str] = set()
    lines = []
    for line in code._lines:
        call = line.strip() if isinstance(line, str) else ""
        if call not in known:
            lines.append(line)
        if call in (kernel.GDC_LAUNCH, kernel.GDC_WAIT):
            known.add(call)
    code._lines = lines


HOOKS: dict[str, Callable[..., None]] = {
    "_handle_pdl_before_access": _before_access,
    "_handle_pdl_after_load": _after_load,
    "_filter_pdl": _keep_first,
}
"""What inductor's class of kernels has for such launches, not in every version of torch, and what does it here."""
