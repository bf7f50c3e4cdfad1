"""What kernels of ours compute beside their own part of a layer: each kernel less saves a microsecond or two.

Rewrites the graph that torch.compile has of a layer, where it finds what the models of transformers have there. What it
does not find is left to torch.compile.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

SUM, PRODUCT, ATTENTION = (f"mii_hpc.{name}.default" for name in ("sum_over_ranks", "product", "paged_attention"))
"""Operators of ours, which torch.compile leaves as they are, by their names in a graph."""


def fuse(module: fx.GraphModule) -> None:
    """Let sums and products take the residuals that follow, products the gates, and attention the rotations."""
    add_residuals(module.graph)
    gate_in_products(module.graph)
    rotate_in_attention(module.graph)
    module.recompile()


def add_residuals(graph: fx.Graph) -> None:
    """Let sums over ranks, and a layer's last product, add what is added to nothing but them right after: residuals."""
    for before, node in itertools.pairwise(list(graph.nodes)):
        if node.target is not operator.add:
            continue
        if str(before.target) == SUM:
            rows, users = before.args[0], {before, node}
        elif str(before.target) == PRODUCT and ("group" in before.kwargs or _ends_layer(before, node)):
            rows, users = before, {node}
        else:
            continue
        others = [arg for arg in node.args if arg is not rows]
        if set(rows.users) == users and len(others) == 1 and _are_alike(rows, others[0]):
            before.kwargs = {**before.kwargs, "residual": others[0]}
            node.replace_all_uses_with(rows)
            graph.erase_node(node)


def _ends_layer(product: fx.Node, node: fx.Node) -> bool:
    """Return whether a sum with a plain product is what a layer returns: others are taken in the norms that follow."""
    return _is_plain_product(product) and {user.op for user in node.users} == {"output"}


def gate_in_products(graph: fx.Graph) -> None:
    """Let the products of gates, merged with what their SiLU is multiplied with, be multiplied in their kernels."""
    for node in graph.find_nodes(op="call_function", target=operator.mul):
        activated, other = node.args
        gate = _input(activated, torch.nn.functional.silu)
        split = _input(gate, operator.getitem)
        rows = _input(split, torch.functional.split)
        if not _is_plain_product(rows) or _input(other, operator.getitem) is not split:
            continue
        sizes, places = split.args[1], [gate.args[1], other.args[1]]
        halves = isinstance(sizes, (list, tuple)) and len(sizes) == 2 and sizes[0] == sizes[1]
        inside = {rows: {split}, split: {gate, other}, gate: {activated}, activated: {node}, other: {node}}
        alone = all(set(one.users) == users for one, users in inside.items())
        if alone and halves and places == [0, 1] and split.kwargs == {"dim": -1}:
            with graph.inserting_before(node):
                product = graph.call_function(rows.target, rows.args, {"gated": True})
            product.meta = node.meta
            node.replace_all_uses_with(product)
            _erase(graph, node)


def rotate_in_attention(graph: fx.Graph) -> None:
    """Let attention rotate its queries and keys, where a model does it right before."""
    for node in list(graph.nodes):
        if str(node.target) != ATTENTION:
            continue
        query, key, *others = plain = node.args
        turned, also = _rotation(_of_batch(query)), _rotation(_of_batch(key))
        if turned is None or also is None or turned[1:] != also[1:]:
            continue
        with graph.inserting_before(node):
            whole = [_first(graph, each) for each in (turned[0], also[0], *turned[1:])]
            query, key = (_transposed(graph, rows) for rows in whole[:2])
        node.args = (query, key, *others)
        node.kwargs = {**node.kwargs, "cos": whole[2], "sin": whole[3]}
        for rows in plain[:2]:
            _erase(graph, rows)


def _first(graph: fx.Graph, node: fx.Node) -> fx.Node:
    first = graph.call_function(operator.getitem, (node, 0))
    # Without it torch does not keep on disk what it makes of the graph.
    first.meta["example_value"] = node.meta["example_value"][0]
    return first


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    transposed = graph.call_method("transpose", (node, 0, 1))
    transposed.meta["example_value"] = node.meta["example_value"].transpose(0, 1)
    return transposed


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody uses, and with it those of its inputs that nobody else uses.

    Not all dead code: what a graph changes in place is used by nobody.
    """
    if node.users or node.op not in ("call_function", "call_method"):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for each in inputs:
        _erase(graph, each)


def _of_batch(node: Any) -> Any:
    """Return the rows [1, heads, tokens, size] of which attention has [tokens, heads, size]."""
    rows = _input(node, "transpose")
    only = _input(rows, operator.getitem)
    return only if only is not None and (*node.args[1:], *rows.args[1:]) == (0, 1, 0) else None


def _rotation(node: Any) -> tuple[Any, Any, Any] | None:
    """Return rows, cosines and sines of `rows * cosines + cat(-second half, first half) * sines`, if it is that.

    The rows are [1, heads, tokens, size], cosines and sines [1, tokens, size].
    """
    straight, across = _input(node, operator.add), _input(node, operator.add, 1)
    rows, cosines = _input(straight, operator.mul), _input(straight, operator.mul, 1)
    turned, sines = _input(across, operator.mul), _input(across, operator.mul, 1)
    angles = [_input(one, "unsqueeze") for one in (cosines, sines)]
    halves = _input(turned, torch.cat)
    if (
        not isinstance(rows, fx.Node)
        or None in angles
        or not halves
        or len(halves) != 2
        or turned.kwargs != {"dim": -1}
    ):
        return None
    size, dtype = rows.meta["example_value"].shape[-1], rows.meta["example_value"].dtype
    parts = [(_input(halves[0], operator.neg), slice(size // 2, None)), (halves[1], slice(None, size // 2))]
    values = [one.meta["example_value"] for one in angles]
    fits = (
        all(_input(part, operator.getitem) is rows and part.args[1] == (Ellipsis, place) for part, place in parts)
        and all(one.args[1:] == (1,) for one in (cosines, sines))
        and all(one.dim() == 3 and len(one) == 1 and one.shape[2] == size and one.dtype == dtype for one in values)
    )
    return (rows, *angles) if fits else None


def _input(node: Any, target: Any, number: int = 0) -> Any:
    """Return an argument of what calls a function, or by its name a method or an operator; None of anything else."""
    if not isinstance(node, fx.Node) or len(node.args) <= number:
        return None
    called = str(node.target) if isinstance(target, str) else node.target
    return node.args[number] if called == target else None


def _is_plain_product(node: Any) -> bool:
    """Return whether that is a product with nothing in its kernel, of numbers that the kernel takes."""
    return (
        _input(node, PRODUCT) is not None
        and len(node.args) == 2
        and not node.kwargs
        and node.args[1].meta["example_value"].dtype in (torch.bfloat16, torch.float16)
    )


def _are_alike(*nodes: Any) -> bool:
    """Return whether nodes of a graph are tensors of one dtype and shape."""
    values = [node.meta.get("example_value") if isinstance(node, fx.Node) else None for node in nodes]
    return all(isinstance(value, torch.Tensor) for value in values) and (
        len({(value.dtype, tuple(map(str, value.shape))) for value in values}) == 1  # type: ignore[union-attr]
    )
