"""How the attention layers of transformers' modules come to attend through a back end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mii_hpc.engine.attention.base import AttentionBackend, LayerAttention
from mii_hpc.engine.attention.visibility import MaskFunction, Visibility, visibility
from mii_hpc.engine.blocks import LayerShape
from mii_hpc.errors import ConfigError

NAME = "mii_hpc"
MEASURED = "mii_hpc_measured"
"""The name while a module is measured. Only then do transformers' models make masks for us: they would do it in every
step, and what a layer sees stays the same."""
# Where a layer finds its back end, and what it sees. Transformers' tables of functions live as long as the process, so
# ours have no state.
ATTRIBUTE = "mii_hpc_attention"
WINDOW = "mii_hpc_window"


def attach(module: nn.Module, backend: AttentionBackend) -> None:
    """Let all attention layers of a module, which has been measured, attend through a back end; it keeps it alive."""
    AttentionInterface.register(NAME, _attend)
    for part in module.modules():
        if hasattr(part, WINDOW):
            setattr(part, ATTRIBUTE, backend.layer(part.layer_idx))  # type: ignore[arg-type]
    module.set_attn_implementation(NAME)  # type: ignore[operator]


def measure_layers(module: nn.Module, device: torch.device, context: int) -> tuple[LayerShape, ...]:
    """Run one token through a module; return what each attention layer keeps of it, by the layer's number.

    What a layer sees, in sequences of up to `context` tokens, is noted in it.
    Raises ConfigError, by name and reason, for a module whose attention cannot be served.
    """
    name = type(module).__name__
    if not module._can_set_attn_implementation():  # type: ignore[operator]
        raise ConfigError(f"{name} cannot be served: its layers do not use transformers' attention interface")
    probe = _Probe()
    AttentionInterface.register(MEASURED, _measure)
    AttentionMaskInterface.register(MEASURED, _Mask.of)
    before = module.config._attn_implementation  # type: ignore[union-attr]
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            setattr(part, ATTRIBUTE, probe)
    module.set_attn_implementation(MEASURED)  # type: ignore[operator]
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with torch.inference_mode():
            module(input_ids=ids, position_ids=ids, logits_to_keep=ids[0], use_cache=False)
        functions = {function for _, function, _ in probe.parts if function is not None}
        seen = {function: visibility(function, context) for function in functions}
        masks = {}
        for part, function, window in probe.parts:
            # Without a mask, the model leaves it to the attention to keep the window.
            visible = Visibility(window) if function is None else seen[function]
            setattr(part, WINDOW, visible.window)
            masks[int(part.layer_idx)] = visible.mask  # type: ignore[arg-type]
    except (ConfigError, TypeError, AttributeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        module.set_attn_implementation(before)  # type: ignore[operator]
        raise ConfigError(f"{name} cannot be served: {error}") from error
    count = module.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if sorted(probe.layers) != list(range(count)) or len(probe.parts) != count:
        module.set_attn_implementation(before)  # type: ignore[operator]
        raise ConfigError(
            f"{name} cannot be served: only {len(probe.layers)} of its {count} layers use transformers' attention "
            f"interface, each once"
        )
    return tuple(replace(probe.layers[layer], mask=masks[layer]) for layer in range(count))


class _Mask:
    """Carries the mask function of a model to its layers, in the place of a mask."""

    def __init__(self, function: MaskFunction) -> None:
        self.function = function

    @classmethod
    def of(cls, *_: Any, mask_function: MaskFunction, **__: Any) -> _Mask:
        """Make one, in the place of transformers' functions that make masks."""
        return cls(mask_function)

    def __getitem__(self, _: Any) -> _Mask:
        """Return itself: there is nothing to cut off."""
        return self


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
    layer: LayerAttention = getattr(module, ATTRIBUTE)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return layer(query, key, value, scaling, getattr(module, WINDOW), softcap, s_aux)[None], None


def _measure(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Mask | torch.Tensor | None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Note the shapes of a layer, and what it sees."""
    if isinstance(attention_mask, torch.Tensor):
        raise ConfigError("attention with a mask of the model's own is not supported")
    if position_bias is not None:
        raise ConfigError("attention with position_bias is not supported")
    probe: _Probe = getattr(module, ATTRIBUTE)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    probe.layers[layer] = LayerShape((key.shape[1], key.shape[2]), (value.shape[1], value.shape[2]), key.dtype)
    probe.parts.append((module, attention_mask.function if attention_mask is not None else None, sliding_window))
    # What a lone token attends to.
    return value.repeat_interleave(query.shape[1] // key.shape[1], 1)[None], None


class _Probe:
    """What a forward pass has shown of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.parts: list[tuple[nn.Module, MaskFunction | None, int | None]] = []
