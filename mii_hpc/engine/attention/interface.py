"""How the attention layers of transformers' modules come to attend through a back end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from mii_hpc.engine.attention.base import AttentionBackend, LayerAttention
from mii_hpc.engine.blocks import LayerShape
from mii_hpc.errors import ConfigError

NAME = "mii_hpc"
# Where a layer finds its back end. Transformers' table of functions lives as long as the process, so ours has no state.
ATTRIBUTE = "mii_hpc_attention"


def attach(module: nn.Module, backend: AttentionBackend) -> None:
    """Let all attention layers of a module attend through a back end; the module keeps it alive."""
    AttentionInterface.register(NAME, _attend)
    for part in module.modules():
        if isinstance(number := getattr(part, "layer_idx", None), int):
            setattr(part, ATTRIBUTE, backend.layer(number))
    module.set_attn_implementation(NAME)  # type: ignore[operator]


def measure_layers(module: nn.Module, device: torch.device) -> tuple[LayerShape, ...]:
    """Run one token through a module; return what each attention layer keeps of it, by the layer's number.

    Raises ConfigError, by name and reason, for a module whose attention cannot be served.
    """
    name = type(module).__name__
    probe = _Probe()
    attach(module, probe)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with torch.inference_mode():
            module(input_ids=ids, position_ids=ids, logits_to_keep=ids[0], use_cache=False)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{name} cannot be served: {error}") from error
    count = module.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if sorted(probe.layers) != list(range(count)):
        raise ConfigError(
            f"{name} cannot be served: only {len(probe.layers)} of its {count} layers use transformers' attention "
            f"interface"
        )
    return tuple(probe.layers[layer] for layer in range(count))


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend for transformers, whose tensors are [1, heads, tokens, size]; `s_aux` are the sinks."""
    if attention_mask is not None:
        raise ConfigError("attention with a mask of the model's own is not supported")
    if position_bias is not None:
        raise ConfigError("attention with position_bias is not supported")
    layer: LayerAttention = getattr(module, ATTRIBUTE)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return layer(query, key, value, scaling, sliding_window, softcap, s_aux)[None], None


class _Probe:
    """Notes each layer's shape. A forward pass of one sequence needs no cache."""

    reads_in_place = False

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}

    def prepare(self, step: object) -> None:
        """There is nothing to prepare."""

    def prepare_decode(self, slots: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor) -> None:
        """There is nothing to prepare."""

    def layer(self, number: int) -> LayerAttention:
        """Return what notes the shape of a layer."""
        return partial(self._attend, number)

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return an output of the right shape: the value, which is what a lone token attends to."""
        self.layers[layer] = LayerShape((key.shape[1], key.shape[2]), (value.shape[1], value.shape[2]), key.dtype)
        return value.repeat_interleave(query.shape[1] // key.shape[1], 1)
