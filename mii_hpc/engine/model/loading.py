"""From a model folder to a module that holds this rank's shard."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mii_hpc.config import ModelConfig
from mii_hpc.engine import processor
from mii_hpc.engine.attention.gather import PagedAttention
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.blocks import LayerShape
from mii_hpc.engine.distributed import quiet
from mii_hpc.engine.model.packing import pack_linears
from mii_hpc.errors import ConfigError

_log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LoadedModel:
    """One rank's shard, ready to run.

    Attributes:
        layers: what each attention layer keeps of a token, by its number.
        context: the model's bound on prompt plus answer, in tokens.
        weights: bytes of this rank's parameters.
    """

    module: nn.Module
    tokenizer: Any
    attention: PagedAttention
    layers: tuple[LayerShape, ...]
    vocabulary: int
    context: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    weights: int

    def forward(self, token_ids: list[int], positions: list[int], keep: list[int]) -> torch.Tensor:
        """Return the logits [kept rows, vocabulary] of packed tokens, after `attention.prepare`."""
        return self.compute(
            torch.tensor([token_ids], device=self.device),
            torch.tensor([positions], device=self.device),
            torch.tensor(keep, device=self.device),
        )

    @torch.inference_mode()
    def compute(self, token_ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Do the same for tokens and positions [1, tokens] that are on the device already."""
        logits: torch.Tensor = self.module(
            input_ids=token_ids, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits
        return logits[0]


def choose_device(spec: EngineSpec) -> torch.device:
    """Return the device of this rank, and make it the current one. Raises ConfigError if there is none."""
    wanted = spec.model.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': this host has no usable CUDA device")
    if wanted == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    device = torch.device("cuda", spec.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def load_model(spec: EngineSpec, device: torch.device, progress: Progress) -> LoadedModel:
    """Load this rank's shard of the model through DeepSpeed.

    With several ranks, each reads only one tensor at a time besides its own shard.
    Raises ConfigError, by name and reason, for a model that cannot be served.
    """
    model = spec.model
    config = _load_config(model)
    dtype = _dtype(model, config, device)
    progress(f"loading {model.model_name_or_path} in {str(dtype).removeprefix('torch.')} on {device}")
    if spec.world_size == 1:
        module = _shard(_load_whole(model, dtype), 1, dtype)
    else:
        _check_heads(config, spec.world_size)
        check_sharding(config, spec.world_size)
        progress("DeepSpeed shards this architecture right")
        module = _load_shard(model, config, dtype, spec, device, progress)
    module.eval().requires_grad_(False)
    pack_linears(module)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    attention = PagedAttention()
    layers = _measure(module, attention, device)
    tokenizer = _load_tokenizer(model)
    progress(f"loaded: {weights / 2**30:.2f} GiB of weights on rank {spec.rank}")
    text_config = config.get_text_config()
    return LoadedModel(
        module=module,
        tokenizer=tokenizer,
        attention=attention,
        layers=layers,
        vocabulary=text_config.vocab_size,
        context=_context(model, text_config),
        eos_token_ids=_eos_token_ids(model, module, tokenizer),
        device=device,
        weights=weights,
    )


def _load_config(model: ModelConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path='{model.model_name_or_path}': {error}") from error


def _load_tokenizer(model: ModelConfig) -> Any:
    name = model.tokenizer or model.model_name_or_path
    if not isinstance(name, str):
        return name
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"tokenizer='{name}': {error}") from error


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


def _context(model: ModelConfig, config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        context = getattr(config, name, None)
        if context:
            return min(int(context), model.max_length or int(context))
    if model.max_length:
        return model.max_length
    raise ConfigError(f"{model.model_name_or_path} does not say how long its context is: set max_length")


def _eos_token_ids(model: ModelConfig, module: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    try:
        generation = GenerationConfig.from_pretrained(model.model_name_or_path)
    except OSError:
        generation = GenerationConfig.from_model_config(module.config)
    ids = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


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
    _refuse_missing(model, sorted(report["missing_keys"]))
    loaded: nn.Module = module
    return loaded


def _refuse_missing(model: ModelConfig, missing: list[str]) -> None:
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(f"the checkpoint {model.model_name_or_path} lacks {shown}")


def _shard(module: nn.Module, ranks: int, dtype: torch.dtype) -> nn.Module:
    """Let DeepSpeed replace the layers of a module by those of this rank, with parameters in `dtype`.

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


def _measure(module: nn.Module, attention: PagedAttention, device: torch.device) -> tuple[LayerShape, ...]:
    """Run one token through the module and see what its attention layers keep."""
    name = type(module).__name__
    module.set_attn_implementation(attention.name)  # type: ignore[operator]
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    try:
        with attention.measure() as measured, torch.inference_mode():
            module(input_ids=ids, position_ids=ids, logits_to_keep=ids[0], use_cache=False)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{name} cannot be served: {error}") from error
    count = module.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    if sorted(measured) != list(range(count)):
        raise ConfigError(
            f"{name} cannot be served: only {len(measured)} of its {count} layers use transformers' attention interface"
        )
    return tuple(measured[layer] for layer in range(count))


def _check_heads(config: Any, ranks: int) -> None:
    text = config.get_text_config()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, field, None)
        if heads is not None and heads % ranks:
            raise ConfigError(f"tensor_parallel={ranks}: {field}={heads} of the model does not divide by it")


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
        module = _shard(module, ranks, torch.float32)
        device = next(module.parameters()).device
        sharded = module(input_ids=ids.to(device), use_cache=False).logits.cpu()
    return float((whole - sharded).abs().max() / whole.abs().max())


def _small(config: Any, ranks: int) -> Any:
    """Return a configuration of the same architecture with few layers, few heads and few words."""
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


def _load_shard(
    model: ModelConfig,
    config: Any,
    dtype: torch.dtype,
    spec: EngineSpec,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Build the module without weights, let DeepSpeed shard the empty layers, then fill them one by one."""
    checkpoint = _Checkpoint(model)
    with _without_weights():
        module: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    sources = checkpoint.names(module)
    module = _shard(module, spec.world_size, dtype)
    _refuse_missing(model, [name for name in shapes if name not in sources])
    modules = [(name, part) for name, part in module.named_modules() if part._parameters]
    for done, (name, part) in enumerate(modules, start=1):
        whole = {}
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                full_name = f"{name}.{leaf}"
                tensor = checkpoint.read(sources[full_name])
                if tensor.shape != shapes[full_name]:
                    raise ConfigError(
                        f"the checkpoint {model.model_name_or_path} has {full_name} as "
                        f"{list(tensor.shape)}, the architecture wants {list(shapes[full_name])}"
                    )
                whole[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        _fill(part, whole, device, name)
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
        # What DeepSpeed does not cut is still the file's own memory; what it cuts may be a view of the whole tensor.
        if share.data_ptr() == read[leaf] or share.untyped_storage().nbytes() > share.nbytes:
            share = share.clone()
        part._parameters[leaf] = nn.Parameter(share, requires_grad=False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Within this context, parameters of new modules take no memory; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Checkpoint:
    """The tensors of a checkpoint in safetensors files, read one at a time."""

    def __init__(self, model: ModelConfig) -> None:
        self._folder = _folder(model.model_name_or_path)
        index = self._folder / "model.safetensors.index.json"
        if index.is_file():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self._folder / "model.safetensors").is_file():
            with safe_open(self._folder / "model.safetensors", framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"{model.model_name_or_path} has no model.safetensors: tensor_parallel above 1 needs the "
                f"checkpoint as safetensors"
            )

    def names(self, module: Any) -> dict[str, str]:
        """Return under which name the file has each parameter of a module, or the one that it is tied to.

        The renaming is transformers' own. Parameters that it would have to compute from several stored ones
        are left out.
        """
        transforms = get_model_conversion_mapping(module)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        wanted = module.state_dict()
        found: dict[str, str] = {}
        for stored in self._files:
            name, converted = rename_source_key(stored, renamings, converters, module.base_model_prefix, wanted)
            if converted is None:
                found[name] = stored
        tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        for name, partner in tied.items():
            if partner in found:
                found.setdefault(name, found[partner])
        return found

    def read(self, stored: str) -> torch.Tensor:
        # Opened anew each time, so that no page of the file stays mapped.
        with safe_open(self._folder / self._files[stored], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor


def _folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
