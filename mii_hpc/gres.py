"""The GPUs that Slurm knows of: generic resources (GRES) of nodes, as sinfo lists them. Pure functions of its answer.

`--gres=gpu:TYPE:N`, N for each node, is the request that every version and every plugin of Slurm understands
(`--gpus-per-node` takes select/cons_tres), and that sites accept which insist on a type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SINFO_FORMAT = "%P|%D|%G|%f"
"""Partition, with a star where it is the default one; number of nodes; their GRES; their features."""
_MIG = re.compile(r"\d+g\.\d+gb")
"""What the types of a GPU's parts have in their names; NCCL does not work across them."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike; `gpus` are those of each node, by type, "" where it has no name."""

    partition: str
    is_default: bool
    count: int
    gpus: dict[str, int]
    features: frozenset[str]


@dataclass(frozen=True)
class Choice:
    """GPUs of a type, "" where it has no name: so many on each of at least so many nodes."""

    type: str
    per_node: int
    nodes: int

    def request(self, per_node: int) -> str:
        """Return what --gres has to say for this many GPUs of a node."""
        return ":".join(part for part in ("gpu", self.type, str(per_node)) if part)


def read_nodes(answer: str) -> list[Nodes]:
    """Read what sinfo answers in SINFO_FORMAT. Other lines, such as the name of a cluster, are passed over."""
    found = []
    for line in answer.splitlines():
        partition, *rest = line.strip().split("|")
        if len(rest) == 3 and rest[0].isdecimal():
            count, gres, features = rest
            names = frozenset(features.split(",")) - {"(null)", ""}
            found.append(Nodes(partition.rstrip("*"), partition.endswith("*"), int(count), gpus_in(gres), names))
    return found


def gpus_in(gres: str) -> dict[str, int]:
    """Return the GPUs of a list of GRES, by type: {"a100": 4} of "gpu:a100:4(S:0-1),nvme:1"."""
    gpus: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = (part for part in entry.strip().split(":") if part != "no_consume")
        if name == "gpu":
            count = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
            kind = ":".join(rest)
            gpus[kind] = gpus.get(kind, 0) + count
    return {kind: count for kind, count in gpus.items() if count}


def of_partitions(nodes: Iterable[Nodes], partitions: str | None, constraint: str | None) -> list[Nodes]:
    """Return the nodes that a job may get: of the named partitions (comma-separated), or else of the default one.

    A constraint of plain features is heeded; one with counts or brackets is left to Slurm.
    """
    names = partitions.split(",") if partitions else None
    there = (each for each in nodes if (each.partition in names if names else each.is_default))
    return [each for each in there if _has(each.features, constraint)]


def _has(features: frozenset[str], constraint: str | None) -> bool:
    if not constraint or re.search(r"[\[\]()*!]", constraint):
        return True
    return any(features.issuperset(re.split("[&,]", either)) for either in constraint.split("|"))


def choose(nodes: Sequence[Nodes], tensor_parallel: int, replica_num: int) -> Choice | None:
    """Return the GPUs to shape a job's nodes for; None where there are none.

    They are of one type, so that replicas are equally fast. Where there is a choice, it is what enough nodes have, what
    holds a replica on one node, what most nodes have, and then the least that does.
    """
    choices = {
        Choice(kind, per_node, sum(each.count for each in nodes if each.gpus.get(kind, 0) >= per_node))
        for one in nodes
        for kind, per_node in one.gpus.items()
    }

    def preference(choice: Choice) -> tuple[object, ...]:
        holds_replica = choice.per_node >= tensor_parallel
        if holds_replica:
            needed = math.ceil(replica_num / (choice.per_node // tensor_parallel))
        else:
            needed = replica_num * math.ceil(tensor_parallel / choice.per_node)
        return (
            _MIG.search(choice.type) is None,
            choice.nodes >= needed,
            holds_replica,
            choice.nodes if holds_replica else choice.per_node,
            -choice.per_node,
            choice.type,
        )

    return max(choices, key=preference, default=None)
