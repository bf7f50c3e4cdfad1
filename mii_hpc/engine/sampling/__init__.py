"""The next token of every sequence in a batch: each sequence's options, a module per way to draw, and the choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mii_hpc.engine.sampling.base import SamplingBackend
from mii_hpc.engine.sampling.host import HostSampling


def create_sampling(drawn: torch.Tensor, vocabulary: int, eos_token_ids: Sequence[int]) -> SamplingBackend:
    """Return the fastest that works where the tensor is that is to hold the token `drawn` last in each slot."""
    if drawn.is_cuda:
        try:
            from mii_hpc.engine.sampling.triton import TritonSampling
        except ImportError:
            return HostSampling(drawn)
        return TritonSampling(drawn, vocabulary, eos_token_ids)
    return HostSampling(drawn)
