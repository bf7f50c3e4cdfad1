"""One rank's shard of a module, cut by the plan that transformers has for most families."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mii_hpc.engine.model.linears import GatheredLinear, Linear, sum_over_ranks
from mii_hpc.errors import ConfigError

Cut = Callable[[torch.Tensor], torch.Tensor]
"""Takes a whole tensor, returns this rank's share of it."""


def apply_plan(module: nn.Module, ranks: int, rank: int) -> dict[str, Cut]:
    """Replace the layers of a module by this rank's; return how each parameter that is not whole is cut, by its name.

    Attention heads, experts' inner sizes and gated layers are shared out; what the plan gathers again, as around
    fused projections, is held in shares and computed with in full.
    Raises ConfigError where there is no plan, or a size does not divide.
    """
    plan: dict[str, str] = module.tp_plan  # type: ignore[assignment]
    if not any(style in ("colwise", "packed_colwise", "colwise_gather_output") for style in plan.values()):
        raise ConfigError("transformers has no plan for it")
    cuts: dict[str, Cut] = {}
    tied = set(getattr(module, "all_tied_weights_keys", None) or ())
    for name, part in list(module.named_modules()):
        style = _style(plan, name)
        if isinstance(part, nn.Linear) and f"{name}.weight" not in tied:
            _replace(module, name, part, style, cuts, ranks, rank)
        elif style == "moe_tp_experts":
            part.register_forward_hook(_sum_of_experts)
        for leaf, parameter in list(part._parameters.items()):
            full = f"{name}.{leaf}"
            style = _style(plan, full)
            if parameter is not None and style in ("packed_colwise", "rowwise") and not isinstance(part, nn.Linear):
                cut = _cut(full, parameter.dim() - 2, ranks, rank, 2) if style == "packed_colwise" else None
                cuts[full] = cut or _cut(full, parameter.dim() - 1, ranks, rank)
                part._parameters[leaf] = nn.Parameter(cuts[full](parameter.data), requires_grad=False)
    return cuts


def _replace(
    module: nn.Module, name: str, part: nn.Linear, style: str | None, cuts: dict[str, Cut], ranks: int, rank: int
) -> None:
    by_rows = style in ("rowwise", "rowwise_split_input")
    if not by_rows and style not in ("colwise", "colwise_gather_output", "packed_colwise"):
        return
    pieces = 2 if style == "packed_colwise" else 1
    cuts[f"{name}.weight"] = _cut(name, 1 if by_rows else 0, ranks, rank, pieces)
    weight = nn.Parameter(cuts[f"{name}.weight"](part.weight.data), requires_grad=False)
    bias: Any = part.bias
    if bias is not None and not by_rows:
        cuts[f"{name}.bias"] = _cut(name, 0, ranks, rank, pieces)
        bias = nn.Parameter(cuts[f"{name}.bias"](bias.data), requires_grad=False)
    new: nn.Module
    if by_rows:
        size = weight.shape[1]
        inputs = slice(rank * size, (rank + 1) * size) if style != "rowwise" else None
        new = Linear(weight, bias, _everyone(), inputs=inputs)
    elif style == "colwise_gather_output":
        new = GatheredLinear(weight, bias, ranks, ranks * weight.shape[0])
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.weight, new.bias = weight, bias
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, new)


def _cut(name: str, dim: int, ranks: int, rank: int, pieces: int = 1) -> Cut:
    """Return what cuts a dimension, which has so many pieces side by side, each of which is shared out."""

    def cut(whole: torch.Tensor) -> torch.Tensor:
        if whole.shape[dim] % (ranks * pieces):
            raise ConfigError(
                f"{name} has {whole.shape[dim] // pieces} rows or columns, which {ranks} ranks cannot share"
            )
        parts = [piece.chunk(ranks, dim)[rank] for piece in whole.chunk(pieces, dim)]
        return torch.cat(parts, dim).contiguous()

    return cut


def _sum_of_experts(part: nn.Module, inputs: Any, output: Any) -> Any:
    output = output.contiguous()
    sum_over_ranks(output, _everyone())
    return output


def _everyone() -> str:
    """Return the name of the group of all ranks."""
    assert dist.group.WORLD is not None
    return str(dist.group.WORLD.group_name)


def _style(plan: dict[str, str], name: str) -> str | None:
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
