"""Metrics of a deployment in Prometheus' format, by the names that vLLM's dashboards know, an `engine` per replica."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mii_hpc.clients.status import DeploymentStatus
from mii_hpc.generation import LATENCY_BOUNDS, TOKEN_BOUNDS, Histogram

LABELS = ("model_name", "engine")


def exposition(status: DeploymentStatus) -> bytes:
    """Return the metrics of a deployment as text."""
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, status: DeploymentStatus) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """Yield every metric."""
        yield from self._loads()
        name = self._status.deployment_name
        epochs = GaugeMetricFamily("mii:replica_epoch", "How often the replica was formed.", labels=LABELS)
        served = CounterMetricFamily("mii:requests_routed", "Requests given to the replica.", labels=LABELS)
        moved = CounterMetricFamily(
            "mii:requests_migrated",
            "Requests that went on elsewhere: from this replica, which was lost, or to it, from a balancer that was.",
            labels=(*LABELS, "cause"),
        )
        lost = CounterMetricFamily("mii:requests_lost", "Requests given up with a lost replica.", labels=LABELS)
        ready = GaugeMetricFamily("mii:replica_ready", "Whether the replica takes requests.", labels=LABELS)
        for replica in self._status.replicas:
            labels = (name, str(replica.index))
            epochs.add_metric(labels, replica.epoch)
            served.add_metric(labels, replica.served)
            moved.add_metric((*labels, "replica"), replica.migrations)
            moved.add_metric((*labels, "balancer"), replica.resumed)
            lost.add_metric(labels, replica.lost)
            ready.add_metric(labels, replica.state == "ready")
        yield from (epochs, served, moved, lost, ready)
        if self._status.ends is not None:
            left = GaugeMetricFamily("mii:seconds_to_walltime", "Until the job's walltime is over.", labels=LABELS[:1])
            left.add_metric((name,), self._status.ends - time.time())
            yield left

    def _loads(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch.", labels=LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait.", labels=LABELS)
        used = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the KV cache in use; 1 is all.", labels=LABELS)
        read = CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts.", labels=LABELS)
        written = CounterMetricFamily("vllm:generation_tokens", "Tokens generated.", labels=LABELS)
        queries = CounterMetricFamily("vllm:prefix_cache_queries", "Tokens looked for in the KV cache.", labels=LABELS)
        hits = CounterMetricFamily("vllm:prefix_cache_hits", "Tokens found in the KV cache.", labels=LABELS)
        success = CounterMetricFamily("vllm:request_success", "Answers.", labels=(*LABELS, "finished_reason"))
        first = HistogramMetricFamily(
            "vllm:time_to_first_token_seconds", "From a request's arrival, of those that stream.", labels=LABELS
        )
        between = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Mean of an answer, of those that stream.", labels=LABELS
        )
        queued = HistogramMetricFamily(
            "vllm:request_queue_time_seconds", "From a request's arrival to its first step.", labels=LABELS
        )
        whole = HistogramMetricFamily("vllm:e2e_request_latency_seconds", "From arrival to end.", labels=LABELS)
        for replica in self._status.replicas:
            if (load := replica.load) is None:
                continue
            labels = (self._status.deployment_name, str(replica.index))
            running.add_metric(labels, load.running)
            waiting.add_metric(labels, load.waiting)
            used.add_metric(labels, 1 - load.free_blocks / load.total_blocks if load.total_blocks else 0)
            read.add_metric(labels, load.prompt_tokens)
            written.add_metric(labels, load.generated_tokens)
            queries.add_metric(labels, load.prefix_queries)
            hits.add_metric(labels, load.prefix_hits)
            for reason, count in load.finished.items():
                success.add_metric((*labels, reason), count)
            _observe(first, labels, load.time_to_first_token, LATENCY_BOUNDS)
            _observe(between, labels, load.inter_token_latency, TOKEN_BOUNDS)
            _observe(queued, labels, load.queue_time, LATENCY_BOUNDS)
            _observe(whole, labels, load.request_latency, LATENCY_BOUNDS)
        yield from (running, waiting, used, read, written, queries, hits, success, first, between, queued, whole)


def _observe(
    family: HistogramMetricFamily, labels: tuple[str, str], observed: Histogram, bounds: tuple[float, ...]
) -> None:
    total, buckets = 0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), observed.counts, strict=False):
        total += count
        buckets.append((bound, total))
    if buckets:
        family.add_metric(labels, buckets, observed.sum)
