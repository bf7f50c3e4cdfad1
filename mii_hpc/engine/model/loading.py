"""From a model folder to a module that holds this rank's shard."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mii_hpc.architecture import Architecture, check_type
from mii_hpc.config import ModelConfig
from mii_hpc.engine import processor
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.blocks import LayerShape
from mii_hpc.engine.memory import free_cached
from mii_hpc.engine.model.check import Serving, check_loaded, choose_serving, measure
from mii_hpc.engine.model.linears import gather_head, replace_linears
from mii_hpc.engine.model.packing import pack_linears
from mii_hpc.engine.model.quantising import QuantisedLinear
from mii_hpc.engine.model.rope import PerSequenceRope
from mii_hpc.engine.model.sharding import load_shard, shard
from mii_hpc.engine.model.weights import refuse_left_over, refuse_missing
from mii_hpc.errors import ConfigError
from mii_hpc.quantisation import Quantisation
from mii_hpc.tensors import check_tensors

_log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LoadedModel:
    """One rank's shard of a model.

    Attributes:
        module: it takes packed tokens; its attention layers wait for a back end.
        layers: what each attention layer keeps of a token, by its number.
        vocabulary: how many token ids there are.
        context: the model's bound on prompt plus answer, in tokens.
        eos_token_ids: those that end an answer, as far as the checkpoint says it.
        weights: bytes of this rank's parameters.
        serving: how it is sharded, and how it attends.
        rope: rotary embeddings that depend on the length of a sequence, if the model has such.
    """

    module: nn.Module
    layers: tuple[LayerShape, ...]
    vocabulary: int
    context: int
    eos_token_ids: tuple[int, ...]
    weights: int
    serving: Serving
    rope: PerSequenceRope | None


def load_model(spec: EngineSpec, device: torch.device, progress: Progress) -> LoadedModel:
    """Load this rank's shard of the model through DeepSpeed.

    With several ranks, each has only a tensor besides its own shard, on a GPU up to a GiB of them.
    Raises ConfigError, by name and reason, for a model that cannot be served.
    """
    model = spec.model
    config = _load_config(model)
    name = (config.architectures or [config.model_type])[0]
    dtype = _dtype(model, config, device)
    progress(f"loading {model.model_name_or_path} in {str(dtype).removeprefix('torch.')} on {device}")
    text = config.get_text_config()
    context, vocabulary = _context(model, config), text.vocab_size
    architecture = _architecture(config)
    architecture.check_served()
    described = config.to_dict()
    check_type(described, model.trust_remote_code)
    if Path(model.model_name_or_path).is_dir():
        of_text = {**described, **text.to_dict()}
        check_tensors(Path(model.model_name_or_path), of_text, spec.world_size, model.quantization_mode)
    if spec.world_size > 1:
        architecture.check_tensor_parallel(spec.world_size)
    serving = choose_serving(config, model, spec.world_size, device)
    if serving is not None:
        progress(f"a small model of this architecture is served right ({serving.sharding}, {serving.way})")
    mode = model.quantization_mode
    quantisation = Quantisation.of(described)
    if quantisation is not None:
        progress(f"the checkpoint's weights, quantised by {quantisation.method}, are held in {mode or str(dtype)}")
    if spec.world_size == 1 and mode is None and quantisation is None and model.adapter is None:
        module = _load_alone(model, config, dtype, device, progress)
    elif serving is None:
        raise ConfigError(
            f"{name} cannot be tried before it loads, as tensor_parallel above 1, quantised weights and an adapter need"
        )
    else:
        module = load_shard(model, config, dtype, spec.world_size, serving.sharding, device, progress)
    module.eval().requires_grad_(False)
    if serving is not None and serving.packed:
        pack_linears(module)
        replace_linears(module)
        gather_head(module)
        free_cached()  # the plan for the KV cache takes what torch keeps for used
    if mode is not None:
        _tell_quantised(module, mode, progress)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    if serving is None:
        serving = check_loaded(
            module, spec.world_size, device, vocabulary, context, model.inference_engine_config.attention
        )
    layers = measure(module, serving.way, device, context)
    progress(f"loaded: {weights / 2**30:.3f} GiB of weights on rank {spec.rank}")
    return LoadedModel(
        module=module,
        layers=layers,
        vocabulary=vocabulary,
        context=context,
        eos_token_ids=_eos_token_ids(model, config),
        weights=weights,
        serving=serving,
        rope=PerSequenceRope.of(module, context) if serving.way == "paged" else None,
    )


def _tell_quantised(module: nn.Module, mode: str, progress: Progress) -> None:
    """Say how much of a module is quantised. Raises ConfigError if it is nothing."""
    parts = [part for part in module.modules() if isinstance(part, QuantisedLinear)]
    if not parts:
        raise ConfigError(f"quantization_mode='{mode}': the model has no linear layers that can be quantised")
    held = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    progress(f"{len(parts)} linear layers hold {mode}, {held / 2**30:.2f} GiB; embeddings, head and all else are plain")


def _load_config(model: ModelConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path='{model.model_name_or_path}': {error}") from error


def _dtype(model: ModelConfig, config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype to serve in, and say so where the processor makes it another than one would expect."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    asked: torch.dtype = stored if model.dtype == "auto" else getattr(torch, model.dtype)
    if device.type == "cuda" or processor.serving_dtype(asked) is asked:
        return asked
    name = str(asked).removeprefix("torch.")
    if model.dtype == "auto":
        _log.warning(
            "dtype='auto': this processor has no instructions for the checkpoint's %s, so the model is served in "
            "float32, which takes %d bytes per weight",
            name,
            torch.float32.itemsize,
        )
        return processor.serving_dtype(asked)
    _log.warning(
        "dtype='%s': this processor has no instructions for it, so linear layers hold and compute float32; the KV "
        "cache and all else are %s",
        name,
        name,
    )
    return asked


def _architecture(config: Any) -> Architecture:
    text = config.get_text_config()

    def get(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except (ValueError, RuntimeError):  # it differs between layers, or between parts
            return None

    return Architecture.read(get)


def _context(model: ModelConfig, config: Any) -> int:
    bounds = [bound for bound in (_architecture(config).context, model.max_length) if bound is not None]
    if not bounds:
        raise ConfigError(f"{model.model_name_or_path} does not say how long its context is: set max_length")
    return min(bounds)


def _eos_token_ids(model: ModelConfig, config: Any) -> tuple[int, ...]:
    try:
        generation = GenerationConfig.from_pretrained(model.model_name_or_path)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    ids = generation.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def _load_alone(
    model: ModelConfig, config: Any, dtype: torch.dtype, device: torch.device, progress: Progress
) -> nn.Module:
    if device.type == "cuda":
        # Straight to the device, where the checkpoint has each parameter as it is; else transformers says what is
        # wrong.
        with suppress(ConfigError):
            return load_shard(model, config, dtype, 1, "whole", device, progress)
    return shard(_load_whole(model, dtype), 1, dtype, "whole")[0]


def _load_whole(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            model.model_name_or_path,
            dtype=dtype,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model_name_or_path='{model.model_name_or_path}': {error}") from error
    refuse_missing(model, sorted(report["missing_keys"]))
    refuse_left_over(model, module, sorted(report["unexpected_keys"]))
    loaded: nn.Module = module
    return loaded
