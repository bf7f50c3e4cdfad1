"""Draws as on the host, but tells what it has drawn a step late, as a GPU does."""

from collections.abc import Sequence

import pytest
import torch

from mii_hpc.engine import batching
from mii_hpc.engine.attention.gather import GatherAttention
from mii_hpc.engine.sampling.base import Draw, Sampler
from mii_hpc.engine.sampling.host import HostSampling
from mii_hpc.engine.step import Step


class LateSampling:
    """See SamplingBackend."""

    lag = 1

    def __init__(self, drawn: torch.Tensor, *_: object) -> None:
        self._drawn = drawn
        self._host = HostSampling(drawn)

    def draw(self, logits: torch.Tensor, step: Step, samplers: Sequence[Sampler]) -> Draw:
        draw = self._host.draw(logits, step, samplers)
        for part, token_id in zip(step.slices, draw.wait().token_ids, strict=True):
            if part.sample:
                self._drawn[part.slot] = max(token_id, 0)
        return draw


def know_tokens_late(patch: pytest.MonkeyPatch) -> None:
    """Let engines that are made from now on begin each step before the tokens of the one before are known."""
    patch.setattr(batching, "create_sampling", LateSampling)
    patch.setattr(GatherAttention, "reads_in_place", True)
