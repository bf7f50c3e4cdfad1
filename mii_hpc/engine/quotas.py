"""How much of each role waits at an engine, and how much may. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mii_hpc.engine.base import EngineSpec
from mii_hpc.errors import QueueFullError
from mii_hpc.generation import GUEST, OWNER, GenerationRequest


class Quotas:
    """The requests that wait at an engine, counted by role, and the bounds on them. Guarded by whoever has it.

    Attributes:
        running: how many sequences of a role may run at once, where that is bounded.
    """

    def __init__(self, spec: EngineSpec) -> None:
        limits, bound = spec.limits, spec.model.inference_engine_config.queue_bound
        owner = ("limits.owner_waiting", limits.owner_waiting) if limits.owner_waiting else ("queue_bound", bound)
        guest = "limits.guest_waiting", limits.guest_waiting or -(-bound // 2)
        self._most = {OWNER: owner, GUEST: guest}
        self._most_bytes = {
            OWNER: ("limits.owner_waiting_bytes", limits.owner_waiting_bytes),
            GUEST: ("limits.guest_waiting_bytes", limits.guest_waiting_bytes),
        }
        bounds = {OWNER: limits.owner_running, GUEST: limits.guest_running}
        self.running: Mapping[str, int] = {role: most for role, most in bounds.items() if most is not None}
        self._waiting: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._waiting.total()

    def enter(self, request: GenerationRequest) -> None:
        """Count a request that begins to wait. Raises QueueFullError when its role has too much waiting already.

        One that was admitted elsewhere is never refused.
        """
        role, size = request.caller[0], request.size
        waiting, bytes_ = self._waiting[role], self._bytes[role]
        name, most = self._most[role]
        if waiting >= most and not request.admitted:
            raise QueueFullError(f"{waiting} requests are waiting, and {name}={most} are allowed; try again later")
        name, most = self._most_bytes[role]
        if waiting and bytes_ + size > most and not request.admitted:
            what = f"{bytes_} bytes of requests are waiting, {size} are to come, and {name}={most} are allowed"
            raise QueueFullError(f"{what}; try again later")
        self._waiting[role] += 1
        self._bytes[role] += size

    def leave(self, request: GenerationRequest) -> None:
        """Count a request no longer: it has started, or was dropped."""
        self._waiting[request.caller[0]] -= 1
        self._bytes[request.caller[0]] -= request.size
