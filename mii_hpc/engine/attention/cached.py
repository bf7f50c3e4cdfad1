"""A step through transformers' own cache: for models whose attention is not transformers' attention interface.

Keys and values lie in the paged cache as always. For each step they are copied into a DynamicCache, and the model
attends as it does in its own `generate`: slower, but right for whatever it does there, such as ALiBi.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import DynamicCache

from mii_hpc.engine.blocks import LayerShape, PagedCache
from mii_hpc.engine.step import Slice, Step
from mii_hpc.errors import ConfigError


class CachedForward:
    """Computes steps of a module that is as transformers has made it."""

    def __init__(self, module: nn.Module, cache: PagedCache, together: bool) -> None:
        """Let sequences that decode share a forward pass, padded on the left, if `together`."""
        self._module = module
        self._cache = cache
        self._together = together
        self._takes_positions = "position_ids" in inspect.signature(module.forward).parameters

    @torch.inference_mode()
    def __call__(self, step: Step) -> torch.Tensor:
        """Return the logits [slices + scores, vocabulary], as ModelRunner.execute() does."""
        logits: dict[int, torch.Tensor] = {}
        for rows in self._rounds(step.slices):
            logits.update(zip(rows, self._compute([step.slices[row] for row in rows]), strict=True))
        every = [logits[row] for row in range(len(step.slices))]
        scores = [rows[: part.num_scores] for rows, part in zip(every, step.slices, strict=True) if part.num_scores]
        return torch.cat([*(rows[-1:] for rows in every), *scores])

    def _rounds(self, slices: Sequence[Slice]) -> Iterator[list[int]]:
        """Yield which slices to compute one round after the other: a slice may share a block that another one fills."""
        page_size = self._cache.page_size
        filled = [set(part.blocks[part.start // page_size :]) for part in slices]
        waiting = list(range(len(slices)))
        while waiting:
            ready = [
                row
                for row in waiting
                if not any(filled[other] & set(slices[row].blocks) for other in waiting if other != row)
            ]
            singles = [row for row in ready if len(slices[row].token_ids) == 1] if self._together else []
            if singles:
                yield singles
            yield from ([row] for row in ready if row not in set(singles))
            waiting = [row for row in waiting if row not in set(ready)]

    def _compute(self, slices: Sequence[Slice]) -> torch.Tensor:
        """Compute slices of equally many tokens; return the logits [slices, tokens, vocabulary], or of the last."""
        device = self._cache.device
        longest, new = max(part.start for part in slices), len(slices[0].token_ids)
        past = [self._slots(part, 0, part.start) for part in slices]
        padding = [longest - part.start for part in slices]
        # The null block's tokens are zeros.
        places = torch.tensor([[0] * pad + slots for pad, slots in zip(padding, past, strict=True)], device=device)
        kept = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
            if longest:
                kept.update(_gather(keys, places), _gather(values, places), layer)
        arguments = {}
        if any(padding):
            mask = [[0] * pad + [1] * (longest - pad + new) for pad in padding]
            arguments["attention_mask"] = torch.tensor(mask, device=device)
        if self._takes_positions:
            positions = [list(range(part.start, part.start + new)) for part in slices]
            arguments["position_ids"] = torch.tensor(positions, device=device)
        logits: torch.Tensor = self._module(
            input_ids=torch.tensor([part.token_ids for part in slices], device=device),
            past_key_values=kept,
            use_cache=True,
            logits_to_keep=new if any(part.num_scores for part in slices) else 1,
            **arguments,
        ).logits
        targets = [slot for part in slices for slot in self._slots(part, part.start, part.start + new)]
        slots = torch.tensor(targets, device=device)
        for layer, (keys, values) in enumerate(zip(self._cache.keys, self._cache.values, strict=True)):
            for pages, tensor in ((keys, kept.layers[layer].keys), (values, kept.layers[layer].values)):
                fresh = tensor[:, :, -new:].transpose(1, 2).flatten(0, 1)
                pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, fresh.to(pages.dtype))
        return logits

    def _slots(self, part: Slice, start: int, end: int) -> list[int]:
        page_size = self._cache.page_size
        return [part.blocks[place // page_size] * page_size + place % page_size for place in range(start, end)]


def measure_cached(module: nn.Module, device: torch.device) -> tuple[LayerShape, ...]:
    """Run one token through a module with a cache; return what each of its layers keeps of it.

    Raises ConfigError, by name and reason, for a module that keeps something else than keys and values.
    """
    name = type(module).__name__
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    kept = DynamicCache()
    try:
        with torch.inference_mode():
            module(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1)
        tensors = [(layer.keys[0], layer.values[0]) for layer in kept.layers]
        shapes = [((key.shape[0], key.shape[2]), (value.shape[0], value.shape[2])) for key, value in tensors]
    except Exception as error:
        raise ConfigError(f"{name} cannot be served: it does not keep keys and values alone: {error}") from error
    if not shapes:
        raise ConfigError(f"{name} cannot be served: it keeps no keys and values")
    return tuple(
        LayerShape(key, value, tensors[0].dtype) for (key, value), tensors in zip(shapes, tensors, strict=True)
    )


def _gather(pages: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return [sequences, heads, tokens, size] of a layer's pages."""
    return pages.view(-1, *pages.shape[2:])[places].transpose(1, 2)
