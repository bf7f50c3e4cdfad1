"""Attention over the paged KV cache: one face, a module per back end, and the choice between them."""

from __future__ import annotations

from mii_hpc.engine.attention.base import AttentionBackend
from mii_hpc.engine.attention.cpu import CpuAttention
from mii_hpc.engine.attention.gather import GatherAttention
from mii_hpc.engine.blocks import PagedCache
from mii_hpc.errors import ConfigError


def create_backend(name: str, cache: PagedCache) -> AttentionBackend:
    """Return the back end that EngineConfig.attention names, over a cache; "auto" is the fastest that works here.

    A model with a mask of its own goes through the gather, whatever is named.
    Raises ConfigError if the one named does not work here.
    """
    if any(layer.mask for layer in cache.layers):
        return GatherAttention(cache)
    if cache.device.type == "cuda" and name in ("auto", "triton"):
        try:
            from mii_hpc.engine.attention.triton import TritonAttention
        except ImportError as error:
            if name == "triton":
                raise ConfigError(f"attention='triton': {error}") from error
        else:
            return TritonAttention(cache)
    backend = CpuAttention.create(cache) if name in ("auto", "cpu") else None
    if backend is not None:
        return backend
    if name == "triton":
        raise ConfigError("attention='triton': takes a GPU")
    if name == "cpu":
        raise ConfigError("attention='cpu': takes a CPU, a C++ compiler, and dtype float32 or bfloat16")
    return GatherAttention(cache)
