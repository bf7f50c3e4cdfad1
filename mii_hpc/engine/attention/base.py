"""The face of an attention back end."""

from __future__ import annotations

from typing import Protocol

import torch

from mii_hpc.engine.step import Step


class LayerAttention(Protocol):
    """How one layer attends."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the keys and values of the packed tokens to the cache, then attend to all tokens that each one sees.

        Args:
            query: [tokens, heads, key size].
            key: [tokens, key heads, key size]; `heads` is a multiple of `key heads`.
            value: [tokens, key heads, value size].
            scaling: factor of the scores; None is key size ** -0.5.
            window: how many tokens each one sees, itself included; None is all before it.
            softcap: bound on the scores, each of which becomes softcap * tanh(score / softcap).
            sinks: [heads], a score of each head that takes part in the softmax and has no value.

        Returns:
            The output [tokens, heads, value size].
        """


class AttentionBackend(Protocol):
    """Writes keys and values to one paged cache, and attends to it, for all layers of one model.

    A forward pass is prepared once, then each layer attends in turn. The tokens of all sequences are packed in one
    row. Every back end does all of a sliding window, a softcap and attention sinks.

    Attributes:
        reads_in_place: whether a decode step costs the same however wide the block tables are, so that it can be a CUDA
            graph that depends on the number of sequences alone.
    """

    reads_in_place: bool

    def prepare(self, step: Step) -> None:
        """Lay out the forward pass of a step."""

    def prepare_decode(self, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        """Lay out a forward pass of one token per sequence from what is on the device already, as in a CUDA graph.

        Args:
            slots: [sequences], where the keys and values go: block * page size + offset in the block.
            tables: [sequences, blocks], block tables, filled up with the null block.
            lengths: [sequences], tokens in all, the new one included; at least 1.
        """

    def layer(self, number: int) -> LayerAttention:
        """Return what the layer of that number is to attend through."""
