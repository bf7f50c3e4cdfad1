"""Whether the engine answers as the model does: tried on a small model of the same architecture before it loads."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from mii_hpc.config import ModelConfig
from mii_hpc.engine.attention import create_backend
from mii_hpc.engine.attention.cached import CachedForward, measure_cached
from mii_hpc.engine.attention.interface import attach, measure_layers
from mii_hpc.engine.blocks import LayerShape, PagedCache
from mii_hpc.engine.distributed import all_agree
from mii_hpc.engine.extensions import extensions_folder
from mii_hpc.engine.memory import Budget, compute_with
from mii_hpc.engine.model.linears import gather_head, replace_linears
from mii_hpc.engine.model.miniature import CONTEXT, miniature
from mii_hpc.engine.model.packing import pack_linears
from mii_hpc.engine.model.quantising import quantise_linears
from mii_hpc.engine.model.rope import PerSequenceRope
from mii_hpc.engine.model.sharding import SHARDINGS, load_shard, shard
from mii_hpc.engine.scheduling import Scheduler
from mii_hpc.engine.step import BlockTable, Step
from mii_hpc.errors import ConfigError
from mii_hpc.generation import OWNER, Caller

_log = logging.getLogger(__name__)

WAYS = ("paged", "cached", "one by one")
"""How a model attends, the fastest first: through an attention back end; through transformers' cache, sequences that
decode together; the same, each sequence alone."""
TOLERANCE = 1e-3
"""How much logits in float32 may differ, in parts of the largest."""
ROUGH_TOLERANCE = 0.05
"""The same in bfloat16 and float16."""
ANY_TOLERANCE = float("inf")
"""The same with quantised weights, whose errors random layers make larger: what is finite will do. How near the
products are is the same for all models."""
PLAIN_CACHES = frozenset((DynamicLayer, DynamicSlidingWindowLayer, DummyLayer))
"""Transformers' caches of layers that keep keys and values, or those of another layer, and no more."""
PAGE_SIZE, BATCH_TOKENS = 8, 32
PROMPTS = (3, 8, 17, 30, 46, 50, 75, 90)
"""Lengths of the prompts. They cross blocks, chunks, and the small model's windows and rotary bounds."""
ANSWER = 5
SHARED = 20
"""Tokens that two of the prompts begin with."""


@dataclass(eq=False)
class _Sequence:
    number: int
    tokens: list[int]
    longest: int
    table: BlockTable = ()
    unknown: int = 0
    computed: int = 0
    registered: int = 0
    slot: int | None = None
    scores: bool = False
    waits: bool = False
    caller: Caller = (OWNER, "")


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        sharding: one of SHARDINGS, or "whole" for one rank.
        way: one of WAYS.
        packed: whether its linear layers can be packed: some models read a layer's weight themselves.
    """

    sharding: str
    way: str
    packed: bool


def choose_serving(config: Any, model: ModelConfig, ranks: int, device: torch.device) -> Serving | None:
    """Return how a model of this configuration is served right, tried on a small one; None where none can be made.

    What was right once is remembered on this host. To be called on all ranks at once.
    Raises ConfigError, by name and reason, for a model that no way serves right.
    """
    attention = model.inference_engine_config.attention
    record = _record(config, model, ranks, device)
    known = None
    with suppress(OSError, ValueError, TypeError):
        known = Serving(**json.loads(record.read_text()))
    if not model.trust_remote_code and _all_ranks(known is not None, ranks):
        return known
    # The model is so small that threads would wait for each other all the time.
    threads = torch.get_num_threads()
    compute_with(1)
    try:
        found = _tried(config, model, ranks, device, attention)
    finally:
        compute_with(threads)
    if found is not None and not model.trust_remote_code:
        # Aside, and renamed: ranks on one host write it at the same time.
        aside = record.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(asdict(found)))
        aside.replace(record)
    return found


def check_loaded(
    module: nn.Module, ranks: int, device: torch.device, vocabulary: int, context: int, attention: str
) -> Serving:
    """Return how a loaded model is served right, tried on itself. Raises ConfigError if it is not.

    To be called on all ranks at once.
    """
    _refuse_state(module)
    expected = expected_logits(module, device, vocabulary, context)
    tolerance = TOLERANCE if next(module.parameters()).dtype == torch.float32 else ROUGH_TOLERANCE
    before = module.config._attn_implementation  # type: ignore[union-attr]
    reasons = []
    for way in WAYS:
        reason = _reason(module, ranks, way, expected, device, vocabulary, context, attention, tolerance)
        if reason is not None and way == "paged":
            module.set_attn_implementation(before)  # type: ignore[operator]
        if reason is None:
            return Serving("whole", way, packed=False)
        reasons.append(reason)
    raise ConfigError(f"{type(module).__name__} cannot be served: {reasons[0]}")


def _tried(config: Any, model: ModelConfig, ranks: int, device: torch.device, attention: str) -> Serving | None:
    context, mode = CONTEXT, model.quantization_mode
    try:
        small = miniature(config, ranks)
        vocabulary = small.get_text_config().vocab_size
        plain = _seeded(small, model, device)
        expected = expected_logits(plain, device, vocabulary, context)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (a configuration may have any rules of its own)
        _log.info("no small model of this architecture can be made: %s", error)
        return None
    _refuse_state(plain)
    name = (config.architectures or [config.model_type])[0]
    reasons = []
    with tempfile.TemporaryDirectory(prefix="mii-check-") as folder:
        if ranks > 1:
            # By each rank: save_pretrained() would write on one alone.
            tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
            save_file(tensors, Path(folder, "model.safetensors"))
        stored = model.model_copy(update={"model_name_or_path": folder, "quantization_mode": None, "adapter": None})
        for sharding in ("whole",) if ranks == 1 else _shardings(plain):
            for way, packed in itertools.product(WAYS, (True, False)):
                failure = None
                try:
                    module = _loaded(small, stored, ranks, sharding, device)
                    if packed:
                        pack_linears(module)
                        replace_linears(module)
                except Exception as error:  # noqa: BLE001 (DeepSpeed fails in many ways on what it does not know)
                    failure = f"{sharding} cannot shard it: {error}"
                # What goes wrong on some ranks only would have the others wait for them.
                if not _all_ranks(failure is None, ranks) or not _alike(module, ranks):
                    reasons.append(failure or f"{sharding} cannot shard it evenly")
                    break
                if packed:
                    gather_head(module)
                reason = _reason(module, ranks, way, expected, device, vocabulary, context, attention, TOLERANCE)
                if reason is None:
                    _log.info("%s is served right: %s, attention %s", name, sharding, way)
                    serving = Serving(sharding, way, packed)
                    if mode is None:
                        return serving
                    quantised = stored.model_copy(update={"quantization_mode": mode})
                    module = _loaded(small, quantised, ranks, sharding, device)
                    reason = _reason(
                        module, ranks, way, expected, device, vocabulary, context, attention, ANY_TOLERANCE
                    )
                    if reason is None and packed:
                        return serving
                    reason = reason or "it reads the weights of its layers itself"
                    raise ConfigError(f"quantization_mode='{mode}': {name} cannot be quantised: {reason}")
                reasons.append(reason)
    if ranks > 1:
        raise ConfigError(
            f"tensor_parallel={ranks}: neither DeepSpeed nor transformers' plan shards {name} right; use "
            f"tensor_parallel=1 ({reasons[0]})"
        )
    raise ConfigError(f"{name} cannot be served: {reasons[0]}")


def _refuse_state(module: Any) -> None:
    """Raise ConfigError for a module whose own cache keeps more than keys and values, as transformers says it.

    A few short prompts need not show that such is lost.
    """
    try:
        kept = {type(layer) for layer in DynamicCache(config=module.config).layers}
    except (ValueError, KeyError, AttributeError, RuntimeError):  # a cache of the model's own
        return
    if more := sorted(layer.__name__ for layer in kept - PLAIN_CACHES):
        raise ConfigError(f"{type(module).__name__} cannot be served: its cache has a {more[0]}, which keeps a state")


def _loaded(small: Any, stored: ModelConfig, ranks: int, sharding: str, device: torch.device) -> nn.Module:
    """Return this rank's shard of the small model. Several ranks read theirs from its files, as of a large one."""
    if ranks == 1:
        whole, _ = shard(_seeded(small, stored, device), ranks, torch.float32, sharding)
        if stored.quantization_mode:
            quantise_linears(whole, stored.quantization_mode)
        return whole
    module = load_shard(stored, small, torch.float32, ranks, sharding, device, lambda sentence: None)
    return module.eval().requires_grad_(False)


def _shardings(module: Any) -> tuple[str, ...]:
    """Return the ways of sharding to try. DeepSpeed leaves experts whole on every rank, where the plan cuts them."""
    has_experts = "moe_tp_experts" in module.tp_plan.values()
    return SHARDINGS[::-1] if has_experts else SHARDINGS


def _reason(
    module: nn.Module,
    ranks: int,
    way: str,
    expected: Expected,
    device: torch.device,
    vocabulary: int,
    context: int,
    attention: str,
    tolerance: float,
) -> str | None:
    """Return why a module is not served right in a way, None if it is on all ranks."""
    reason = None
    try:
        error = difference(module, way, expected, device, vocabulary, context, attention)
        _log.debug("%s, %s: logits differ by %.2g of their size", type(module).__name__, way, error)
        if error >= tolerance:
            reason = f"its answers would differ from transformers' own by {error:.2g} of their size"
    except ConfigError as refusal:
        reason = str(refusal).rpartition("cannot be served: ")[2]
    except Exception as failure:  # noqa: BLE001 (a model can fail in any way)
        reason = f"{type(failure).__name__}: {failure}"
    # What one rank alone finds wrong would have it wait for the others in the next way.
    if _all_ranks(reason is None, ranks):
        return None
    return reason or "on another rank its answers would differ from transformers' own"


def _seeded(config: Any, model: ModelConfig, device: torch.device) -> nn.Module:
    """Return a model of random weights, alike on all ranks, which attends to all tokens differently."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        module: nn.Module = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=model.trust_remote_code
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return module.eval().to(device)


def _record(config: Any, model: ModelConfig, ranks: int, device: torch.device) -> Path:
    """Return the file that remembers a configuration, for what serves it now."""
    about = {
        "config": config.to_dict(),
        "ranks": ranks,
        "device": device.type,
        "attention": model.inference_engine_config.attention,
        "quantization_mode": model.quantization_mode,
        "versions": [torch.__version__, transformers.__version__, version("deepspeed")],
        "engine": [path.read_text() for path in sorted(Path(__file__).parents[1].rglob("*.py"))],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    folder = extensions_folder() / "served"
    folder.mkdir(exist_ok=True)
    return folder / digest[:32]


def _all_ranks(own: bool, ranks: int) -> bool:
    return own if ranks == 1 else all_agree(own)


def _alike(module: nn.Module, ranks: int) -> bool:
    """Return whether all ranks hold shares of the same shapes of each layer; the head may be uneven."""
    if ranks == 1:
        return True
    layers = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    shapes = repr([tuple(parameter.shape) for part in layers for parameter in part.parameters()])
    number = int.from_bytes(hashlib.sha256(shapes.encode()).digest()[:7], "big")
    least, most = torch.tensor(number), torch.tensor(number)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool(least == most)


Expected = dict[tuple[int, int], torch.Tensor]
"""The logits that the plain module gives after so many tokens of a sequence: (number, tokens)."""


def expected_logits(module: nn.Module, device: torch.device, vocabulary: int, context: int) -> Expected:
    """Return what a module answers by itself: each time to one sequence alone, without a cache."""
    expected = {}
    with torch.inference_mode():
        for sequence, tokens in _sequences(vocabulary, context):
            for length in range(len(sequence.tokens), sequence.longest):
                ids = torch.tensor([tokens[:length]], device=device)
                expected[sequence.number, length] = module(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    return expected


def difference(
    module: nn.Module, way: str, expected: Expected, device: torch.device, vocabulary: int, context: int, attention: str
) -> float:
    """Return by how much of their size the engine's logits differ from the expected ones at most.

    The prompts are prefilled in chunks, packed with each other, and decoded, some behind a shared prefix.
    """
    layers = measure(module, way, device, context)
    budget = Budget(len(PROMPTS), BATCH_TOKENS, PAGE_SIZE, 128)
    cache = PagedCache(layers, budget.num_blocks + 1, PAGE_SIZE, device)
    rope = PerSequenceRope.of(module, context) if way == "paged" else None
    forward = forward_of(module, way, cache, attention, rope)
    scheduler: Scheduler[_Sequence] = Scheduler(budget, rope is None, None if rope is None else rope.bound)
    whole = {}
    for sequence, tokens in _sequences(vocabulary, context):
        whole[sequence.number] = tokens
        scheduler.add(sequence)
    worst = 0.0
    scale = max(float(logits.abs().max()) for logits in expected.values())
    while scheduler.has_work():
        step, sequences = scheduler.schedule()
        logits = forward(step).float().cpu()
        for row, (sequence, part) in enumerate(zip(sequences, step.slices, strict=True)):
            if not part.sample:
                continue
            sequence.unknown -= 1
            error = (logits[row] - expected[sequence.number, len(sequence.tokens)]).abs().max() / scale
            worst = max(worst, float(error)) if error.isfinite() else float("inf")
            if len(sequence.tokens) + 1 == sequence.longest:
                scheduler.remove([sequence])
            else:
                sequence.tokens.append(whole[sequence.number][len(sequence.tokens)])
    return worst


def measure(module: nn.Module, way: str, device: torch.device, context: int) -> tuple[LayerShape, ...]:
    """Return what each layer keeps of a token when the module attends in a way. Raises ConfigError if it cannot."""
    return measure_layers(module, device, context) if way == "paged" else measure_cached(module, device)


def forward_of(
    module: nn.Module, way: str, cache: PagedCache, attention: str, rope: PerSequenceRope | None
) -> Callable[[Step], torch.Tensor]:
    """Return what computes the steps of a module that has been measured, over a cache."""
    if way != "paged":
        return CachedForward(module, cache, together=way == "cached")
    backend = create_backend(attention, cache)
    attach(module, backend)

    @torch.inference_mode()
    def forward(step: Step) -> torch.Tensor:
        backend.prepare(step)
        if rope is not None:
            rope.prepare(step, cache.device)
        token_ids, positions, rows = packed(step, cache.device)
        logits: torch.Tensor = module(
            input_ids=token_ids, position_ids=positions, logits_to_keep=rows, use_cache=False
        ).logits[0]
        return logits

    return forward


def packed(step: Step, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the token ids [1, tokens] of a step, their positions, and the row of each slice's last token."""
    columns = step.token_ids[None], step.positions[None], step.last_rows
    token_ids, positions, last_rows = (torch.from_numpy(column).to(device, torch.int64) for column in columns)
    return token_ids, positions, last_rows


def _sequences(vocabulary: int, context: int) -> list[tuple[_Sequence, list[int]]]:
    """Return the sequences, each with all its tokens, the answer's included."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, max(3, min(vocabulary, 2**15)), (len(PROMPTS), max(PROMPTS) + ANSWER), generator=generator)
    words[-1, :SHARED] = words[-2, :SHARED]
    result = []
    for number, (prompt, tokens) in enumerate(zip(PROMPTS, words.tolist(), strict=True)):
        if prompt + ANSWER <= context:
            result.append((_Sequence(number, tokens[:prompt], prompt + ANSWER + 1), tokens))
    return result
