"""Metrics as Prometheus reads them agree with what was sent."""

import re
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from mii_hpc.clients.status import DeploymentStatus, ReplicaStatus
from mii_hpc.deployments.state import DeploymentState
from mii_hpc.gateway.metrics import exposition
from mii_hpc.generation import LATENCY_BOUNDS, TOKEN_BOUNDS, Load, Observed


def values(text):
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(s.name, *sorted(s.labels.items())): s.value for s in samples}


def test_prometheus_reads_what_was_sent(start):
    face = start(replica_num=2)
    with face.openai() as api, face.http() as http:

        def read():
            answer = http.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            return values(answer.text)

        before = read()
        for number in range(4):
            api.completions.create(model="chat", prompt="a b c", max_tokens=2 + number)
        list(api.completions.create(model="chat", prompt="a", max_tokens=20, stream=True))
        api.completions.create(model="chat", prompt="a b", stop="b")
        after = read()

    def grown(name, **labels):
        keys = [key for key in after if key[0] == name and set(labels.items()) <= set(key[1:])]
        assert keys, name
        return sum(after[key] - before.get(key, 0) for key in keys)

    assert grown("vllm:prompt_tokens_total") == 4 * 3 + 1 + 2
    assert grown("vllm:generation_tokens_total") == 2 + 3 + 4 + 5 + 20 + 2
    assert grown("vllm:request_success_total", finished_reason="length") == 5
    assert grown("vllm:request_success_total", finished_reason="stop") == 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 6
    assert grown("vllm:request_queue_time_seconds_count") == 6
    assert grown("mii:requests_migrated_total") == grown("mii:requests_lost_total") == 0
    assert grown("mii:requests_routed_total", engine="0") == grown("mii:requests_routed_total", engine="1") == 3
    assert grown("vllm:num_requests_running") == grown("vllm:num_requests_waiting") == 0
    assert {after["mii:replica_ready", ("engine", str(engine)), ("model_name", "chat")] for engine in (0, 1)} == {1}
    assert after["mii:replica_epoch", ("engine", "0"), ("model_name", "chat")] == 1


def test_everything_that_is_known_of_a_replica_is_told():
    seconds = Observed(LATENCY_BOUNDS)
    seconds.add(0.5)
    gaps = Observed(TOKEN_BOUNDS)
    gaps.add(0.02, 4)
    load = Load(
        1, 2, 3, 4, 5, 6, 7, 8, {"stop": 9}, seconds.histogram, gaps.histogram, seconds.histogram, seconds.histogram
    )
    replica = ReplicaStatus(0, "ready", "node0", 2, 1, 10, "", load, migrations=11, resumed=12, lost=13)
    ends = time.time() + 3600
    status = DeploymentStatus("chat", DeploymentState.READY, "7", "node0", 0.0, ends, (replica,))
    told = values(exposition(status).decode())
    left = told.pop(("mii:seconds_to_walltime", ("model_name", "chat")))
    assert 0 < left <= 3600
    labels = (("engine", "0"), ("model_name", "chat"))
    expected = {
        "vllm:num_requests_running": 1,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:generation_tokens_total": 5,
        "vllm:prompt_tokens_total": 6,
        "vllm:prefix_cache_queries_total": 7,
        "vllm:prefix_cache_hits_total": 8,
        "mii:replica_epoch": 2,
        "mii:replica_ready": 1,
        "mii:requests_routed_total": 10,
        "mii:requests_lost_total": 13,
    }
    histograms = ("time_to_first_token", "e2e_request_latency", "request_queue_time")
    for name, count, total in (*((name, 1, 0.5) for name in histograms), ("inter_token_latency", 4, 0.08)):
        expected |= {f"vllm:{name}_seconds_count": count, f"vllm:{name}_seconds_sum": total}
    buckets = {key for key in told if key[0].endswith("_bucket")}
    with_labels = {
        **{(name, *labels): value for name, value in expected.items()},
        ("vllm:request_success_total", labels[0], ("finished_reason", "stop"), labels[1]): 9,
        ("mii:requests_migrated_total", ("cause", "replica"), *labels): 11,
        ("mii:requests_migrated_total", ("cause", "balancer"), *labels): 12,
    }
    assert {key: value for key, value in told.items() if key not in buckets} == with_labels
    assert len(buckets) == 3 * (len(LATENCY_BOUNDS) + 1) + len(TOKEN_BOUNDS) + 1


def test_buckets_count_all_that_is_not_above_their_bound(start):
    face = start()
    with face.openai() as api, face.http() as http:
        for count in (1, 6):
            list(api.completions.create(model="chat", prompt="a", max_tokens=count, stream=True))
        told = values(http.get("/metrics").text)
    for name in ("e2e_request_latency", "request_queue_time"):
        buckets = [value for key, value in told.items() if key[0] == f"vllm:{name}_seconds_bucket"]
        assert sorted(buckets) == buckets
        assert buckets[-1] == told[f"vllm:{name}_seconds_count", ("engine", "0"), ("model_name", "chat")]


def test_the_dashboard_asks_for_metrics_that_are_there(start):
    dashboard = (Path(__file__).parents[2] / "configs" / "grafana.json").read_text()
    asked = set(re.findall(r"(?:vllm|mii):\w+", dashboard)) - {"mii:seconds_to_walltime"}  # of a job with a walltime
    face = start()
    with face.openai() as api, face.http() as http:
        list(api.completions.create(model="chat", prompt="a", max_tokens=3, stream=True))
        told = {key[0] for key in values(http.get("/metrics").text)}
    assert asked <= told
