"""Linear layers on a GPU: products, those of the same rows in one, and the sum over the ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.nn.functional import linear, pad, silu

if TYPE_CHECKING:
    from mii_hpc.engine.model.peers import Peers

_log = logging.getLogger(__name__)

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that, side by side in one module, have the same input in most architectures. A product with all their weights
at once reads them faster: on an H100, 2.8 TB/s where a key projection of an 8B model alone is read at 1.0."""


class Linear(nn.Module):
    """A linear layer, or a rank's share of one whose products are added up over the ranks of a replica."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        group: str | None = None,
        inputs: slice | None = None,
    ) -> None:
        """With a `group` its ranks' products are added up before the bias is; `inputs` are those of this rank."""
        super().__init__()
        self.weight, self.bias = weight, bias
        self._group = group
        self.inputs = inputs
        self.peers: Peers | None = None
        self.sums_in_product = False

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for rows [..., inputs]."""
        if self.inputs is not None:
            rows = rows[..., self.inputs]
        if self._group is None:
            return product(rows, self.weight, self.bias)
        if self.peers is not None and self.sums_in_product:
            peers = {"addresses": self.peers.addresses, "counts": self.peers.counts}
            output: torch.Tensor = any_product(rows, self.weight, group=self._group, **peers)
        else:
            output = product(rows, self.weight, None)
            sum_with(self.peers, output, self._group)
        return output if self.bias is None else output + self.bias


class MergedLinear(nn.Module):
    """Several linear layers whose weights lie in one."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        weights: list[torch.Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        self.sizes = [len(weight) for weight in weights]
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if layers[0].bias is not None:
            biases: list[torch.Tensor] = [layer.bias for layer in layers]  # type: ignore[misc]
            self.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.rows: torch.Tensor | None = None
        self.outputs: tuple[torch.Tensor, ...] = ()


class Part(nn.Module):
    """One of the layers that are merged. The first that sees certain rows computes for all of them."""

    def __init__(self, merged: MergedLinear, number: int) -> None:
        super().__init__()
        self._merged = merged
        self._number = number

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this layer's output for rows [..., inputs]."""
        merged = self._merged
        if merged.rows is not rows:
            merged.rows = rows
            outputs = product(rows, merged.weight, merged.bias)
            merged.outputs = torch.split(outputs, merged.sizes, dim=-1)
        output = merged.outputs[self._number]
        if self._number == len(merged.sizes) - 1:
            # In most architectures nobody asks again, and the memory is wanted.
            merged.rows, merged.outputs = None, ()
        return output


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return rows [..., inputs] times a weight [outputs, inputs], plus a bias."""
    if torch.compiler.is_compiling():
        output: torch.Tensor = any_product(rows, weight)
        return output if bias is None else output + bias
    kernels = _kernels() if rows.is_cuda else None
    if kernels is None or not kernels.is_quick(rows, weight):
        return linear(rows, weight, bias)
    output = kernels.multiply(rows, weight)
    return output if bias is None else output + bias


@torch.library.custom_op("mii_hpc::product", mutates_args=())
def any_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    gated: bool = False,
    group: str | None = None,
    addresses: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `product` without a bias: an operator for any number of rows, so that layers are compiled once for all.

    What follows it can be done in its kernel: `gated`, the SiLU of the first half of the outputs times the second half;
    or, given the peers of a group, `sum_over_ranks`; then the sum with a residual.
    """
    kernels = _kernels() if rows.is_cuda else None
    members = None if group is None else _resolve_process_group(group)  # type: ignore[arg-type]
    if kernels is not None and kernels.is_quick(rows, weight):
        sums = None
        if members is not None:
            sums = kernels.Sums(addresses, counts, members.rank())
        output: torch.Tensor = kernels.multiply(rows, weight, gated, sums, residual)
        return output
    output = linear(rows, weight)
    if gated and kernels is not None:
        output = kernels.gate(output)
    elif gated:
        first, second = output.chunk(2, dim=-1)
        output = silu(first) * second
    if group is not None:
        sum_over_ranks(output, group, addresses, counts, residual)
    elif residual is not None:
        output += residual
    return output


@any_product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, gated: bool = False, *_: object) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0] // 2 if gated else weight.shape[0])


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the kernels for few rows; None where Triton is missing."""
    try:
        from mii_hpc.engine.model import products
    except ImportError:
        return None
    return products


def sum_with(peers: Peers | None, rows: torch.Tensor, group: str) -> None:
    """Add the other ranks' rows to these, which are contiguous; small ones through the memory of peers."""
    if peers is None:
        sum_over_ranks(rows, group)
    else:
        sum_over_ranks(rows, group, peers.addresses, peers.counts)


@torch.library.custom_op("mii_hpc::sum_over_ranks", mutates_args=("rows",))
def sum_over_ranks(
    rows: torch.Tensor,
    group: str,
    addresses: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """Add the other ranks' rows to these, which are contiguous; given those of Peers, small ones in their memory.

    Then add a residual, which is alike. torch.compile leaves an operator of ours as it is.
    """
    members = _resolve_process_group(group)  # type: ignore[arg-type]
    if addresses is not None and counts is not None:
        from mii_hpc.engine.model.peers import add_up, is_small

        if is_small(rows, len(addresses)):
            add_up(rows, addresses, counts, members.rank(), residual)
            return
    dist.all_reduce(rows, group=members)
    if residual is not None:
        rows += residual


class GatheredLinear(nn.Module):
    """A rank's share of a linear layer's outputs, of which each rank gets all."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, ranks: int, outputs: int) -> None:
        """The ranks have as many outputs each; what is beyond the layer's own `outputs` only fills up."""
        super().__init__()
        self.weight, self.bias = weight, bias
        self._ranks, self._outputs = ranks, outputs

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for rows [..., inputs]."""
        gathered: torch.Tensor = gather(product(rows, self.weight, self.bias), self._ranks)
        return gathered[..., : self._outputs]


@torch.library.custom_op("mii_hpc::gather", mutates_args=())
def gather(rows: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return all ranks' rows side by side. An operator of our own, because torch.compile leaves it as it is."""
    everyone = rows.new_empty(ranks * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.contiguous())
    return everyone.view(ranks, *rows.shape).movedim(0, -2).flatten(-2)


@gather.register_fake
def _(rows: torch.Tensor, ranks: int) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], rows.shape[-1] * ranks)


def gather_head(module: nn.Module) -> None:
    """Give each rank some outputs of a module's head, if it has had some inputs until now; on all ranks at once.

    Ranks then send each other half of what a sum takes, and less the more ranks there are.
    """
    try:
        head = module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a model whose code comes with it
        return
    if type(head) is Linear and head.inputs is not None:
        gathered = _by_outputs(head)
        for part in list(module.modules()):
            for name, child in list(part._modules.items()):
                if child is head:
                    setattr(part, name, gathered)


def _by_outputs(layer: Linear) -> GatheredLinear:
    """Return a layer that takes a part of the inputs as one of which each rank has some outputs."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    outputs, inputs = layer.weight.shape
    share = -(-outputs // ranks)
    everyones = layer.weight.new_empty(ranks, dtype=torch.int64)
    dist.all_gather_into_tensor(everyones, everyones.new_tensor([inputs]))
    sizes = [share * count for count in everyones.tolist()]
    beyond = ranks * share - outputs
    sent = pad(layer.weight, (0, 0, 0, beyond)) if beyond else layer.weight
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent.contiguous().view(-1), sizes, [share * inputs] * ranks)
    del sent
    parts = torch.split(received, sizes)
    weight = torch.cat([part.view(share, size // share) for part, size in zip(parts, sizes, strict=True)], 1)
    bias = layer.bias
    if bias is not None:
        own = pad(bias, (0, beyond))[rank * share : (rank + 1) * share]
        bias = nn.Parameter(own.clone(), requires_grad=False)
    return GatheredLinear(nn.Parameter(weight, requires_grad=False), bias, ranks, outputs)


def replace_linears(module: nn.Module) -> None:
    """Replace the linear layers of a module on a GPU, also those that DeepSpeed has put there, one module at a time."""
    for part in [part for part in module.modules() if part._modules]:
        for name, child in list(part._modules.items()):
            plain = _plain(child)
            if plain is not None:
                setattr(part, name, plain)
        for names in MERGED:
            layers = [part._modules.get(name) for name in names]
            if _merge(layers):
                merged = MergedLinear(layers)  # type: ignore[arg-type]
                for number, name in enumerate(names):
                    setattr(part, name, Part(merged, number))


def share_memory(module: nn.Module, device: torch.device, agree: Callable[[bool], bool]) -> None:
    """Let the layers of a module add up small sums in memory that the ranks share; on all ranks of one host at once.

    NCCL does it where they have none: `agree` says whether all ranks have, given whether this one does.
    """
    memory = peers = None
    try:
        from mii_hpc.engine.model.peers import Peers, room

        memory = room(dist.get_world_size(), device)
    except (ImportError, RuntimeError) as error:
        _log.info("the ranks do not share GPU memory: %s", str(error).partition("\n")[0])
    # Who has none would be waited for in what follows.
    if not agree(memory is not None):
        return
    try:
        peers = Peers.meet(memory, dist.group.WORLD)  # type: ignore[arg-type]
    except RuntimeError as error:
        _log.info("the ranks do not share GPU memory: %s", str(error).partition("\n")[0])
    if agree(peers is not None):
        summed = [part for part in module.modules() if isinstance(part, Linear) and part._group is not None]
        kernels = _kernels()
        # All ranks of a sum take it in the same way, though some may have more inputs than others, or none.
        in_product = agree(kernels is not None and all(kernels.can_be_summed(part.weight) for part in summed))
        for part in module.modules():
            if hasattr(part, "peers"):
                part.peers = peers  # type: ignore[assignment]
        for part in summed:
            part.sums_in_product = in_product


def _merge(layers: list[nn.Module | None]) -> bool:
    """Return whether layers are plain ones that can be merged."""
    plain = [layer for layer in layers if type(layer) is Linear and layer._group is None]
    return (
        len(plain) == len(layers)
        and len({layer.weight.shape[1] for layer in plain}) == 1
        and len({layer.bias is None for layer in plain}) == 1
    )


def _plain(layer: Any) -> Linear | None:
    """Return the same layer as ours, or None if it is to stay as it is."""
    share = None if type(layer) is Linear else share_of(layer)
    # Also of a layer of which this rank has nothing: its sum is taken as the other ranks take it.
    if share is None or not share.weight.is_cuda:
        return None
    group = None if share.group is None else share.group.group_name
    return Linear(share.weight, share.bias, group, share.inputs)


@dataclass(frozen=True)
class Share:
    """What a rank has of a linear layer; see Linear."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    group: dist.ProcessGroup | None = None
    inputs: slice | None = None


def share_of(layer: Any) -> Share | None:
    """Return what a rank has of a linear layer, as DeepSpeed or the plan has cut it; None for any other layer."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, LmHeadLinearAllreduce

    # These and none that are derived from them, which may do something else.
    kind = type(layer)
    if kind is nn.Linear or (kind is LinearLayer and not layer.gather_output):
        return Share(layer.weight, layer.bias)
    if kind is LinearAllreduce:
        return Share(layer.weight, layer.bias, layer.mp_group)
    if kind is LmHeadLinearAllreduce:
        first = sum(layer._partition_sizes[: layer.tp_index])
        return Share(layer.weight, layer.bias, layer.mp_group, slice(first, first + layer.weight.shape[1]))
    if kind is Linear:  # of the plan, whose sums are over all ranks
        return Share(layer.weight, layer.bias, dist.group.WORLD, layer.inputs)
    return None
