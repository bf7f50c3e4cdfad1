from mii_hpc.cli.top import quantile
from mii_hpc.generation import Histogram


def test_top_shows_every_replica_and_leaves_after_its_looks(run, chat):
    run("generate", "chat", "a b c")
    text = run("top", "chat", "--count", 2, "--interval", 0.1).output
    assert "chat: ready" in text
    assert {"OUT/S", "MOVED", "LOST"} <= set(text.split())
    rows = run("top", "chat", "--count", 1, "--json").data
    assert [(row["replica"], row["state"], row["running"]) for row in rows] == [(0, "ready", 0), (1, "ready", 0)]


def test_quantiles_are_bounds():
    bounds = (1.0, 2.0, 3.0)
    assert quantile(Histogram((), 0.0), bounds, 0.5) is None
    assert quantile(Histogram((0, 0, 0, 0), 0.0), bounds, 0.5) is None
    assert quantile(Histogram((5, 4, 1, 0), 0.0), bounds, 0.5) == 1.0
    assert quantile(Histogram((5, 4, 1, 0), 0.0), bounds, 0.95) == 3.0
    assert quantile(Histogram((0, 0, 0, 9), 0.0), bounds, 0.5) is None
