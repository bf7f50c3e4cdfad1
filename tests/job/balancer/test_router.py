from types import SimpleNamespace

import pytest

from mii_hpc.errors import UnavailableError
from mii_hpc.job.balancer import router
from mii_hpc.job.balancer.router import Router
from mii_hpc.rpc.wire import BatchPosition


def routed(router, count):
    return [router.next().index for _ in range(count)]


def live(index):
    return SimpleNamespace(index=index)


def test_the_router_is_strict():
    router = Router()
    with pytest.raises(UnavailableError):
        router.next()
    for index in (2, 0, 1):
        router.add(live(index))
    assert routed(router, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert router.remove(1).index == 1
    assert router.remove(1) is None
    assert sorted(routed(router, 4)) == [0, 0, 2, 2]
    router.add(live(1))
    assert sorted(routed(router, 6)) == [0, 0, 1, 1, 2, 2]
    assert sum(router.served.values()) == 17
    assert [replica.index for replica in router.live] == [0, 1, 2]


def test_to_choose_a_replica_takes_no_look_at_all_of_them():
    looks = 0

    class Replica:
        def __init__(self, index):
            self._index = index

        @property
        def index(self):
            nonlocal looks
            looks += 1
            return self._index

    router = Router()
    for index in range(128):
        router.add(Replica(index))
    looks = 0
    for _ in range(256):
        router.next()
    assert looks <= 4 * 256


def test_a_batch_takes_consecutive_turns_in_whatever_order_it_arrives():
    router = Router()
    for index in range(3):
        router.add(live(index))
    router.next()
    arrivals = [
        BatchPosition("a", 2, 4),
        BatchPosition("b", 1, 2),
        BatchPosition("a", 0, 4),
        None,
        BatchPosition("a", 3, 4),
        BatchPosition("b", 0, 2),
        BatchPosition("a", 1, 4),
    ]
    # One request before, then four turns of a, two of b, and one more request.
    assert [router.next(place).index for place in arrivals] == [turn % 3 for turn in (3, 6, 1, 7, 4, 5, 2)]
    assert router.next().index == 8 % 3


def test_a_forgotten_list_does_no_harm(monkeypatch):
    monkeypatch.setattr(router, "BATCHES_REMEMBERED", 2)
    forgetful = Router()
    forgetful.add(live(0))
    for call in "abcabc":
        assert forgetful.next(BatchPosition(call, 0, 2)).index == 0
    assert len(forgetful._batches) == 2
