"""The state of a deployment and its replicas, as clients see it."""

from __future__ import annotations

from dataclasses import dataclass

from mii_hpc.deployments.state import DeploymentState
from mii_hpc.generation import Load


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica.

    Attributes:
        state: "waiting", "forming", "loading" or "ready".
        epoch: how often it was formed.
        in_flight: requests that the balancer has passed to it and that have not ended.
        served: requests that it was given since the balancer started.
        detail: what it is doing, or why it is not ready.
        load: that of its engine; None when it is not ready, or did not answer at once.
        migrations: requests that went on elsewhere because it was lost, since the balancer started.
        resumed: requests that went on at it because a balancer was lost or replaced, since this one started.
        lost: requests that were given up when it was lost, since the balancer started.
    """

    index: int
    state: str
    host: str
    epoch: int
    in_flight: int
    served: int
    detail: str
    load: Load | None = None
    migrations: int = 0
    resumed: int = 0
    lost: int = 0


@dataclass(frozen=True)
class DeploymentStatus:
    """A deployment. Times are seconds since the epoch.

    Attributes:
        ends: when the walltime of its job is over; None without one.
        until: when its uptime is over, through all its jobs; None without one.
        successor: the id of the job that is to follow; "" when there is none yet.
    """

    deployment_name: str
    state: DeploymentState
    job_id: str
    host: str
    started: float | None
    ends: float | None
    replicas: tuple[ReplicaStatus, ...]
    until: float | None = None
    successor: str = ""
