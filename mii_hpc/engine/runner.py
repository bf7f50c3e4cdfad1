"""One rank of a replica executes steps: its shard of the model, its part of the KV cache, its attention."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError

from mii_hpc.engine.attention import create_backend
from mii_hpc.engine.attention.cached import CachedForward
from mii_hpc.engine.attention.interface import attach
from mii_hpc.engine.base import EngineSpec
from mii_hpc.engine.blocks import PagedCache
from mii_hpc.engine.compiled import CompiledLayers
from mii_hpc.engine.devices import choose_device, room_on
from mii_hpc.engine.distributed import Ranks
from mii_hpc.engine.graphs import DecodeGraphs
from mii_hpc.engine.memory import compute_with, plan_budget, threads
from mii_hpc.engine.model.linears import share_memory
from mii_hpc.engine.model.loading import load_model
from mii_hpc.engine.step import DRAWN, Step, StepCodec
from mii_hpc.engine.upload import upload
from mii_hpc.heap import trim_heap

_log = logging.getLogger(__name__)


class ModelRunner:
    """What all ranks of a replica do alike. Rank 0 calls `execute` for each step, and the others `follow` it.

    Attributes:
        budget: the sizes to schedule for, the same on all ranks.
        vocabulary: how many token ids there are.
        context: the bound on prompt plus answer, in tokens.
        eos_token_ids: those that end an answer, as far as the checkpoint says it.
        recompute_beyond: so long may a sequence grow before all of it is computed anew; None is for ever.
        drawn: [max_batch_size + 1], on rank 0 the token that each slot has drawn last, for slices with DRAWN.
        runs_ahead: whether a step may begin before the tokens of the one before are known. Not where padding is read:
            numbers that are not finite would be cleared too late.
    """

    def __init__(self, spec: EngineSpec, progress: Callable[[str], None]) -> None:
        """Meet the other ranks, load this rank's shard, and make the cache.

        Raises ConfigError, by name and reason, for a model that cannot be served.
        """
        config = spec.model.inference_engine_config
        self._spec = spec
        self._device = choose_device(spec, progress)
        self.bind_thread()
        self._ranks: Ranks | None = None
        if spec.world_size > 1:
            progress("meeting the other ranks of the replica")
            self._ranks = Ranks(spec, self._device)
        with room_on(self._device):
            model = load_model(spec, self._device, progress)
        self.vocabulary, self.context, self.eos_token_ids = model.vocabulary, model.context, model.eos_token_ids
        self.budget = plan_budget(spec, model.layers, model.context, self._device, model.weights)
        if self._ranks:
            # All ranks hold the same blocks, each its own heads of them.
            self.budget = self.budget.with_blocks(self._ranks.minimum(self.budget.num_blocks))
        self._module = model.module
        if self._ranks and self._device.type == "cuda" and spec.replica_local_size == spec.world_size:
            share_memory(self._module, self._device, self._ranks.all_agree)
        # One block more, for the null block.
        self._cache = PagedCache(model.layers, self.budget.num_blocks + 1, self.budget.page_size, self._device)
        self._rope = model.rope
        self.recompute_beyond = None if model.rope is None else model.rope.bound
        self._cached: CachedForward | None = None
        self._attention = create_backend(config.attention, self._cache)
        if model.serving.way == "paged":
            attach(self._module, self._attention)
        else:
            self._cached = CachedForward(self._module, self._cache, together=model.serving.way == "cached")
        self.runs_ahead = self._cached is None and self._attention.reads_in_place
        self.drawn = torch.zeros(self.budget.max_batch_size + 1, dtype=torch.int64, device=self._device)
        self._codec = StepCodec()
        progress(f"KV cache: {self.budget.num_blocks} blocks of {self.budget.page_size} tokens")
        self._compiled: CompiledLayers | None = None
        self._graphs: DecodeGraphs | None = None
        if config.cuda_graphs and not self._cached and DecodeGraphs.work_on(self._device, self._attention):
            context = min(self.context, self.budget.num_blocks * self.budget.page_size)
            agree = self._ranks.all_agree if self._ranks else bool
            share = self._ranks.share if self._ranks else None
            if config.compile:
                self._compiled = CompiledLayers(self._module)
            self._graphs = DecodeGraphs(self._decode, self._attention, self._cache, self.drawn, context, agree, share)
            self._graphs.capture(progress)

    def bind_thread(self) -> None:
        """Give the calling thread, which is to execute steps, the device and the CPU threads of this rank."""
        compute_with(threads(self._spec, self._device))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def execute(self, step: Step) -> torch.Tensor:
        """Compute a step, on all ranks when called on rank 0. A GPU may not have begun when this returns.

        Returns the logits [slices + scores, vocabulary], good until the next step: after each slice's last token, and
        then those that the slices' `scores` ask for, slice by slice.
        """
        if self._ranks and self._spec.rank == 0:
            self._ranks.broadcast(self._codec.encode(step))
        if step.clear:
            self._cache.clear(step.clear)
        if self._cached:
            return self._cached(step)
        if self._rope:
            self._rope.prepare(step, self._device)
        if self._graphs and (logits := self._graphs.run(step)) is not None:
            return logits
        self._attention.prepare(step)
        last_rows = step.last_rows
        drawn = np.flatnonzero(step.token_ids[last_rows] == DRAWN)
        parts = (
            step.token_ids,
            step.positions,
            np.concatenate([last_rows, step.scored_rows]),
            step.slots[drawn],
            last_rows[drawn],
        )
        sizes = [len(part) for part in parts]
        uploaded = upload(np.concatenate(parts, dtype=np.int64), self._device)
        token_ids, positions, rows, slots, targets = torch.split(uploaded, sizes)
        if len(drawn):
            token_ids[targets] = self.drawn[slots]
            if self._ranks:
                self._ranks.share(token_ids)
        return self.forward(token_ids[None], positions[None], rows)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of some rows of the packed tokens [1, tokens]; attention is prepared."""
        logits: torch.Tensor = self._module(
            input_ids=token_ids, position_ids=positions, logits_to_keep=rows, use_cache=False
        ).logits
        return logits[0]

    def _decode(self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the same for a decode step, by compiled layers where that works."""
        if self._compiled:
            try:
                with self._compiled.used(len(rows)):
                    return self.forward(token_ids, positions, rows)
            except (TorchDynamoException, FailOnRecompileLimitHit, InductorError) as error:
                reason = str(error).partition("\n")[0]
                _log.warning("decode steps run without torch.compile, a fifth slower: %s", reason)
                self._compiled = None
        return self.forward(token_ids, positions, rows)

    def follow(self) -> None:
        """Execute the steps of rank 0 until it stops; for the other ranks. Raises RuntimeError if it is gone."""
        assert self._ranks is not None
        while not (step := self._codec.decode(self._ranks.receive())).stop:
            self.execute(step)

    def stop(self) -> None:
        """Let the other ranks return from `follow`; for rank 0."""
        if self._ranks:
            self._ranks.broadcast(self._codec.encode(Step.of(stop=True)))
            self._ranks.flush()

    def close(self) -> None:
        """Free the model and the cache. Nothing can be executed afterwards."""
        self._graphs = self._compiled = self._cached = None
        del self._module, self._attention, self._cache, self.drawn
        trim_heap()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
