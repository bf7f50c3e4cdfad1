"""Rotary embeddings that depend on how long a sequence is, decided for each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from mii_hpc.engine.step import Step


class PerSequenceRope:
    """Stands in for the forward pass of a module's rotary embeddings of the kind "longrope".

    Transformers chooses between two sets of frequencies by the largest position that it is given: right for one whole
    sequence, wrong for several that are packed, and for a prompt that is read in chunks. Here the length of a
    token's own sequence decides. A sequence that grows beyond `bound` must be computed anew, as in `generate`.
    """

    def __init__(self, forward: Callable[..., Any], bound: int) -> None:
        self.bound = bound
        self._forward = forward
        self._long: torch.Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, context: int) -> Self | None:
        """Return that of a module, put into its place at the first call.

        None for a module that needs none for sequences of up to `context` tokens.
        """
        for part in module.modules():
            installed = part.__dict__.get("forward")
            if isinstance(installed, cls):
                return installed
            if getattr(part, "rope_type", None) == "longrope":
                bound = int(part.config.rope_parameters["original_max_position_embeddings"])  # type: ignore[union-attr, index]
                if bound >= context:
                    return None
                rope = cls(part.forward, bound)
                part.forward = rope
                return rope
        return None

    def prepare(self, step: Step, device: torch.device) -> None:
        """Note how long the sequences of a step are."""
        self._long = None
        # A decode step may be a CUDA graph, which reads nothing but its own inputs: there the positions tell it.
        if (step.lengths != step.starts + 1).any():
            long = (step.lengths > self.bound).repeat(step.counts)
            self._long = torch.from_numpy(long[None]).to(device)

    def __call__(self, rows: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Return cosines and sines [1, tokens, size]."""
        short = self._forward(rows, position_ids.clamp(max=self.bound - 1))
        beyond = torch.full_like(position_ids[:, :1], self.bound)
        long = self._forward(rows, torch.cat([position_ids, beyond], 1))
        chosen = (position_ids >= self.bound if self._long is None else self._long)[..., None]
        return tuple(torch.where(chosen, there[:, :-1], here) for here, there in zip(short, long, strict=True))
