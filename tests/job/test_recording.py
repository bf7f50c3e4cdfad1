import pytest

from mii_hpc.constants import GenerationFinishReason
from mii_hpc.generation import Load, Response
from mii_hpc.job import recording


@pytest.fixture
def clock(monkeypatch):
    """What the time is, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    return now


def piece(generated, index=0, ended=False):
    reason = GenerationFinishReason.LENGTH if ended else GenerationFinishReason.NONE
    return Response("a ", 3, generated, reason, index=index)


def test_a_stream_is_timed(clock):
    recorder = recording.Recorder()
    request = recorder.request()
    for seconds, generated, ended in ((100.3, 1, False), (100.9, 3, False), (101.5, 7, True)):
        clock[0] = seconds
        request.piece(piece(generated, ended=ended))
    load = recorder.added_to(Load(generated_tokens=7))
    assert (load.generated_tokens, load.prompt_tokens, load.finished) == (7, 3, {"length": 1})
    assert (sum(load.time_to_first_token.counts), load.time_to_first_token.sum) == (1, pytest.approx(0.3))
    assert (sum(load.inter_token_latency.counts), load.inter_token_latency.sum) == (6, pytest.approx(1.2))
    assert (sum(load.request_latency.counts), load.request_latency.sum) == (1, pytest.approx(1.5))


def test_a_whole_answer_does_not_tell_when_its_first_token_came(clock):
    recorder = recording.Recorder()
    request = recorder.request()
    clock[0] = 102.0
    for index in (0, 1):
        request.piece(piece(5, index, ended=True))
    load = recorder.added_to(Load())
    assert (load.prompt_tokens, load.finished) == (3, {"length": 2})
    assert sum(load.time_to_first_token.counts) == sum(load.inter_token_latency.counts) == 0
    assert (sum(load.request_latency.counts), load.request_latency.sum) == (2, 4.0)
