"""The states of a deployment: what the registry, status and clients say of it."""

from __future__ import annotations

from enum import StrEnum


class DeploymentState(StrEnum):
    """What a deployment is doing.

    pending -> loading -> ready <-> degraded -> stopping -> ended. A job that is requeued goes back to pending. serve()
    writes the first state, and the balancer of the deployment all others.
    """

    PENDING = "pending"
    """The job waits in the queue, or its ranks have not met. Entered by serve(), and by the balancer of a job that
    ends because it is requeued."""
    LOADING = "loading"
    """The balancer listens, and not every replica has generated something yet."""
    READY = "ready"
    """Every replica takes requests."""
    DEGRADED = "degraded"
    """Every replica has been ready, and at least one is not: the others take its requests, until it is back."""
    STOPPING = "stopping"
    """No request is admitted any more; those that run get a few seconds."""
    UNRESPONSIVE = "unresponsive"
    """The job runs, and its balancer gives no sign of life: its node is gone, or it is about to be replaced. Written
    nowhere; it is what a client finds."""
    ENDED = "ended"
    """The job has ended. Written nowhere, for the entry is withdrawn; it is what a client finds where nobody was left
    to withdraw it."""
