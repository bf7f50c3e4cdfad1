"""One rank's shard of a module."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM

from mii_hpc.config import ModelConfig
from mii_hpc.engine.compiled import compiler_imported
from mii_hpc.engine.distributed import quiet
from mii_hpc.engine.model.plan import Cut, apply_plan
from mii_hpc.engine.model.quantising import quantised
from mii_hpc.engine.model.weights import Checkpoint, refuse_left_over, refuse_missing
from mii_hpc.errors import ConfigError
from mii_hpc.quantisation import Quantisation

SHARDINGS = ("DeepSpeed", "plan")
"""How layers are cut, in this order of preference: by DeepSpeed, or by transformers' plan for the family."""


def shard(module: nn.Module, ranks: int, dtype: torch.dtype, sharding: str) -> tuple[nn.Module, dict[str, Cut]]:
    """Replace the layers of a module by this rank's, with parameters in `dtype`; return it, and what the plan cuts.

    They are on the current device. Buffers stay as they are: their content is computed and not read, and rotary
    frequencies, for one, must stay float32 for positions to be told apart.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    cuts: dict[str, Cut] = {}
    if sharding == "plan":
        cuts = apply_plan(module, ranks, dist.get_rank())
        ranks = 1
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
    return sharded, cuts


def replicated(config: Any, ranks: int) -> Any:
    """Return a configuration with as many KV heads as ranks, if it has fewer: each is held by several ranks."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None)
    if not isinstance(heads, int) or heads >= ranks or ranks % heads:
        return config
    config = copy.deepcopy(config)
    config.get_text_config().num_key_value_heads = ranks
    return config


def repeat_heads(tensor: torch.Tensor, wanted: torch.Size, config: Any, ranks: int) -> torch.Tensor:
    """Return a projection to keys or values with the heads that replicated() has added; any other as it is."""
    heads = getattr(config.get_text_config(), "num_key_value_heads", None)
    if not isinstance(heads, int) or heads >= ranks or tensor.shape == wanted or tensor.shape[1:] != wanted[1:]:
        return tensor
    by_head = tensor.view(heads, -1, *tensor.shape[1:])
    return by_head.repeat_interleave(ranks // heads, 0).flatten(0, 1)


def load_shard(
    model: ModelConfig,
    config: Any,
    dtype: torch.dtype,
    ranks: int,
    sharding: str,
    device: torch.device,
    progress: Callable[[str], None],
) -> nn.Module:
    """Build the module without weights, let DeepSpeed shard the empty layers, then fill them one by one.

    With `quantization_mode`, each is quantised as soon as it is filled.
    Raises ConfigError, by name, for a checkpoint that lacks tensors or has them in other shapes.
    """
    checkpoint = Checkpoint(model, Quantisation.of(config.to_dict()))
    with _without_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(
            replicated(config, ranks), dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    sources = checkpoint.names(module)
    left_over = sources.keys() - module.state_dict().keys()
    refuse_left_over(model, module, sorted(name for name in left_over if not checkpoint.changes_nothing(sources[name])))
    module, cuts = shard(module, ranks, dtype, sharding)
    refuse_missing(model, [name for name in shapes if name not in sources])
    kept: dict[str, nn.Parameter] = {}
    modules = [(name, part) for name, part in module.named_modules() if part._parameters]
    order = [
        sources[f"{name}.{leaf}"] for name, part in modules for leaf, own in part._parameters.items() if own is not None
    ]
    config_of_engine = model.inference_engine_config
    compiles = device.type == "cuda" and config_of_engine.compile and config_of_engine.cuda_graphs
    with checkpoint.reading(order, device), compiler_imported(compiles):
        for done, (name, part) in enumerate(modules, start=1):
            whole = {}
            for leaf, parameter in part._parameters.items():
                full_name = f"{name}.{leaf}"
                if ranks == 1 and sources.get(full_name) in kept:
                    # Such as a head that is tied to the embeddings. Shares of the two DeepSpeed cuts apart.
                    part._parameters[leaf] = kept[sources[full_name]]
                elif parameter is not None:
                    tensor = checkpoint.read(sources[full_name], device)
                    tensor = repeat_heads(tensor, shapes[full_name], config, ranks)
                    if tensor.shape != shapes[full_name]:
                        raise ConfigError(
                            f"the checkpoint {model.model_name_or_path} has {full_name} as "
                            f"{list(tensor.shape)}, the architecture wants {list(shapes[full_name])}"
                        )
                    tensor = cuts[full_name](tensor) if full_name in cuts else tensor
                    whole[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
            _fill(part, whole, device, name)
            layer = quantised(name, part, model.quantization_mode) if model.quantization_mode else None
            if layer is None:
                kept |= {sources[f"{name}.{leaf}"]: part._parameters[leaf] for leaf in whole}
            else:
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, layer)
                part._parameters.clear()  # the list holds on to it
            if done % max(1, len(modules) // 10) == 0:
                progress(f"{done} of {len(modules)} layers loaded")
    checkpoint.refuse_unmerged()
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
