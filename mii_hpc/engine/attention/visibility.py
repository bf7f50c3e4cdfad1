"""Which tokens an attention layer lets each token see, as the model's own mask function says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mii_hpc.errors import ConfigError

MaskFunction = Callable[..., torch.Tensor]
"""Transformers': from indices of the batch, the head, the query and the key, whether the one sees the other."""

SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Visibility:
    """What a token sees of those before it and itself.

    Attributes:
        window: how many of the last ones; None is all.
        mask: which ones, where a window does not say it; it takes positions of one sequence.
    """

    window: int | None = None
    mask: MaskFunction | None = None


def visibility(function: MaskFunction, context: int) -> Visibility:
    """Return what a mask function says of sequences of up to `context` tokens.

    The function is asked, not read: for all keys of a sample of the queries, the first and the last ones among them.
    Raises ConfigError if a token sees a later one, for what is computed of a prompt would depend on how it is cut.
    """
    size = min(context, 2**20)
    spread = torch.linspace(0, size - 1, SAMPLED_ROWS).long()
    last = int(_rows(function, torch.tensor([size - 1]), size).sum())
    # A window, a chunk, and what else is periodic, changes there.
    edges = torch.tensor([place + step for place in (last, 2 * last, size - last) for step in (-2, -1, 0, 1)])
    rows = torch.cat([torch.arange(min(size, SAMPLED_ROWS)), spread, edges.clamp(0, size - 1)])
    window = None if last == size else last
    for some in torch.split(rows, max(1, 2**22 // size)):
        seen, keys = _rows(function, some, size), torch.arange(size)
        if (seen & (keys > some[:, None])).any():
            raise ConfigError("its tokens attend to later ones, which are not known while it generates")
        expected = keys <= some[:, None]
        if window is not None:
            expected &= keys > some[:, None] - window
        if not torch.equal(seen, expected):
            return Visibility(mask=function)
    return Visibility(window)


def _rows(function: MaskFunction, queries: torch.Tensor, size: int) -> torch.Tensor:
    return see(function, queries[:, None], torch.arange(size)[None])


def see(function: MaskFunction, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return for positions of queries and of keys, which are broadcast, whether the one sees the other."""
    zero = torch.zeros((), dtype=torch.long, device=keys.device)
    seen = function(zero, zero, queries, keys)
    return torch.as_tensor(seen, dtype=torch.bool, device=keys.device).expand((queries + keys).shape)
