"""One rank's shard of a module, cut by DeepSpeed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from mii_hpc.config import ModelConfig
from mii_hpc.engine.distributed import quiet
from mii_hpc.engine.model.weights import Checkpoint, refuse_missing
from mii_hpc.errors import ConfigError


def shard(module: nn.Module, ranks: int, dtype: torch.dtype) -> nn.Module:
    """Let DeepSpeed replace the layers of a module by this rank's, with parameters in `dtype`.

    They are on the current device. Buffers stay as they are: their content is computed and not read, and rotary
    frequencies, for one, must stay float32 for positions to be told apart.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    # DeepSpeed refuses what the processor has no instructions for, and converts and makes anew the buffers as well.
    accepted = dtype if dtype in accelerator.supported_dtypes() else torch.float32
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with quiet():
        engine = deepspeed.init_inference(
            module, tensor_parallel={"tp_size": ranks}, dtype=accepted, replace_with_kernel_inject=False
        )
    sharded: nn.Module = engine.module.to(dtype)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        sharded.get_submodule(owner)._buffers[leaf] = buffer.to(accelerator.current_device_name())
    return sharded


def check_sharding(config: Any, ranks: int) -> None:
    """Raise ConfigError when DeepSpeed shards an architecture so that it answers wrongly.

    A small model of the same architecture is made, alike on all ranks, and must give the same logits
    whole and sharded. To be called on all ranks at once.
    """
    name = (config.architectures or [config.model_type])[0]
    try:
        difference = _sharding_error(_small(config, ranks), ranks)
    except Exception as error:  # DeepSpeed fails in many ways on what it does not know
        raise ConfigError(f"tensor_parallel={ranks}: DeepSpeed cannot shard {name}: {error}") from error
    if not difference < 1e-3:
        raise ConfigError(
            f"tensor_parallel={ranks}: DeepSpeed shards {name} wrongly: its answers differ by "
            f"{difference:.2g} of their size; use tensor_parallel=1"
        )


def _sharding_error(config: Any, ranks: int) -> float:
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        ids = torch.arange(16)[None]
        whole = module(input_ids=ids, use_cache=False).logits
        module = shard(module, ranks, torch.float32)
        device = next(module.parameters()).device
        sharded = module(input_ids=ids.to(device), use_cache=False).logits.cpu()
    return float((whole - sharded).abs().max() / whole.abs().max())


def _small(config: Any, ranks: int) -> Any:
    """Return a configuration of the same architecture with few layers, few heads and a small vocabulary."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = text.num_attention_heads
    shared = heads // (getattr(text, "num_key_value_heads", None) or heads)
    few = 2 * ranks * shared if heads % (2 * ranks * shared) == 0 else heads
    head_size = text.hidden_size // heads
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": few,
        "num_key_value_heads": few // shared,
        "hidden_size": head_size * few,
        "word_embed_proj_dim": head_size * few,
        "intermediate_size": 32 * ranks,
        "ffn_dim": 32 * ranks,
        "vocab_size": 64,
        "pad_token_id": None,
    }
    for field, size in sizes.items():
        if getattr(text, field, None) is not None:
            setattr(text, field, size)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return small


def load_shard(
    model: ModelConfig,
    config: Any,
    dtype: torch.dtype,
    ranks: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> nn.Module:
    """Build the module without weights, let DeepSpeed shard the empty layers, then fill them one by one.

    Raises ConfigError, by name, for a checkpoint that lacks tensors or has them in other shapes.
    """
    checkpoint = Checkpoint(model)
    with _without_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    sources = checkpoint.names(module)
    module = shard(module, ranks, dtype)
    refuse_missing(model, [name for name in shapes if name not in sources])
    kept: dict[str, nn.Parameter] = {}
    modules = [(name, part) for name, part in module.named_modules() if part._parameters]
    for done, (name, part) in enumerate(modules, start=1):
        whole = {}
        for leaf, parameter in part._parameters.items():
            full_name = f"{name}.{leaf}"
            if ranks == 1 and sources.get(full_name) in kept:
                # Such as a head that is tied to the embeddings. Where there are shares, DeepSpeed cuts the two apart.
                part._parameters[leaf] = kept[sources[full_name]]
            elif parameter is not None:
                tensor = checkpoint.read(sources[full_name], device)
                if tensor.shape != shapes[full_name]:
                    raise ConfigError(
                        f"the checkpoint {model.model_name_or_path} has {full_name} as "
                        f"{list(tensor.shape)}, the architecture wants {list(shapes[full_name])}"
                    )
                whole[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        _fill(part, whole, device, name)
        kept |= {sources[f"{name}.{leaf}"]: part._parameters[leaf] for leaf in whole}
        if done % max(1, len(modules) // 10) == 0:
            progress(f"{done} of {len(modules)} layers loaded")
    return module


def _fill(part: nn.Module, whole: dict[str, nn.Parameter], device: torch.device, name: str) -> None:
    """Put this rank's share of whole tensors into a layer, cut as DeepSpeed's layer cuts it."""
    from deepspeed.module_inject.layers import TensorParallel_Layer

    read = {leaf: parameter.data_ptr() for leaf, parameter in whole.items()}
    if isinstance(part, TensorParallel_Layer):
        part._tp_partition([whole.get("weight"), whole.get("bias")])
    for leaf, parameter in whole.items():
        empty = part._parameters[leaf]
        if empty is None or parameter.shape != empty.shape:
            raise ConfigError(f"DeepSpeed's shard of {name} cannot be loaded: use tensor_parallel=1")
        share = parameter.data.to(device).contiguous()
        # On CPU, what DeepSpeed does not cut is still the file's own memory; what it cuts may be a view of the whole.
        is_mapped = device.type == "cpu" and share.data_ptr() == read[leaf]
        if is_mapped or share.untyped_storage().nbytes() > share.nbytes:
            share = share.clone()
        part._parameters[leaf] = nn.Parameter(share, requires_grad=False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Within this context, parameters of modules that this thread makes take no memory; buffers are real."""
    thread = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    with register_module_parameter_registration_hook(on_meta):  # type: ignore[arg-type]
        yield
