import threading
from concurrent.futures import Future

import pytest

from mii_hpc.engine.model import reading
from mii_hpc.engine.model.reading import Reader
from tests.waiting import PATIENCE, eventually


class File:
    """What is read, and in which order it has been begun; a name that is held back takes until it is let go."""

    def __init__(self, *held):
        self.begun = []
        self.held = {name: Future() for name in held}
        self._lock = threading.Lock()

    def read(self, name):
        with self._lock:
            self.begun.append(name)
        if name in self.held:
            self.held[name].result(PATIENCE)
        if name == "broken":
            raise OSError("broken")
        return name.upper()


@pytest.fixture
def reader():
    made = []

    def make(file, announced):
        made.append(Reader(file.read, announced))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_is_announced_is_read_before_it_is_asked_for(reader):
    file = File()
    reads = reader(file, [("a", 1), ("b", 1), ("c", 1)])
    eventually(lambda: sorted(file.begun) == ["a", "b", "c"], PATIENCE, "all are read")
    assert [reads.read(name) for name in "abc"] == ["A", "B", "C"]
    assert len(file.begun) == 3


def test_no_more_is_read_ahead_than_is_allowed(reader, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD_BYTES", 10)
    file = File()
    reads = reader(file, [("a", 6), ("b", 4), ("c", 1), ("d", 99), ("e", 1)])
    assert set(reads._begun) == {"a", "b"}
    assert reads.read("a") == "A"
    assert set(reads._begun) == {"b", "c"}, "the next is too large for what is left"
    assert [reads.read("b"), reads.read("c")] == ["B", "C"]
    assert set(reads._begun) == {"d"}, "one that is larger than all is read when there is no other"
    assert [reads.read("d"), reads.read("e")] == ["D", "E"]


def test_what_is_asked_for_otherwise_is_read_once(reader, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD_BYTES", 1)
    file = File()
    reads = reader(file, [("a", 1), ("b", 1), ("c", 1)])
    assert [reads.read(name) for name in ("c", "new", "a", "b", "a")] == ["C", "NEW", "A", "B", "A"]
    assert sorted(file.begun) == ["a", "a", "b", "c", "new"]


def test_an_error_reaches_who_asks(reader):
    file = File()
    reads = reader(file, [("broken", 1), ("a", 1)])
    with pytest.raises(OSError, match="broken"):
        reads.read("broken")
    assert reads.read("a") == "A"


def test_no_thread_is_left():
    reads = Reader(File().read, [("a", 1), ("b", 1)])
    threads = list(reads._threads._threads)
    reads.close()
    assert threads and not any(thread.is_alive() for thread in threads)
