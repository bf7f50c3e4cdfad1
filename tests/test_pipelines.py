import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import mii_hpc as mii
from tests.waiting import PATIENCE

ECHO = {"inference_engine_config": {"engine": "echo", "echo_delay": 0.01}}


def test_it_is_called_like_a_client():
    with mii.pipeline(**ECHO) as pipe:
        assert [str(answer) for answer in pipe(["to be", "or not"])] == ["to be ", "or not "]
        (answer,) = pipe("to be", num_return_sequences=1, max_new_tokens=3)
        assert (answer.generated_text, answer.finish_reason, answer.replica) == ("to be to ", "length", 0)
        assert len(pipe("to be", num_return_sequences=3)) == 3
        assert pipe([]) == []


def test_a_stream_gives_its_pieces_and_ends_when_left():
    with mii.pipeline(**ECHO) as pipe:
        assert [str(piece) for piece in pipe.stream("a b c")] == ["a ", "b ", "c "]
        seen = []
        assert str(pipe("a b", streaming_fn=seen.extend)[0]) == "a b "
        assert len(seen) == 2
        for _ in pipe.stream("a", max_new_tokens=10**6):
            break
        assert pipe._engine.stats().running == 0


def test_more_prompts_than_the_queue_holds_take_turns():
    with mii.pipeline(inference_engine_config={"engine": "echo", "queue_bound": 3}) as pipe:
        prompts = [f"p{number}" for number in range(50)]
        assert [str(answer) for answer in pipe(prompts)] == [f"{prompt} " for prompt in prompts]


def test_errors_are_those_of_a_client():
    with mii.pipeline(**ECHO) as pipe:
        with pytest.raises(mii.InvalidRequestError, match="empty") as caught:
            pipe(["good", "", "fine"])
        first, second, third = caught.value.responses
        assert (str(first[0]), second, str(third[0])) == ("good ", caught.value, "fine ")
        with pytest.raises(mii.InvalidRequestError, match="max_new_tokens"):
            pipe("a", max_new_token=3)
        with pytest.raises(mii.InvalidRequestError, match="one prompt at a time"):
            pipe(["a", "b"], streaming_fn=print)
        with pytest.raises(mii.RequestTimeoutError, match=r"timeout=0\.05"):
            pipe("a", max_new_tokens=10**6, timeout=0.05)
        assert pipe._engine.stats().running == 0


def test_what_needs_more_processes_is_refused():
    for name in ("tensor_parallel", "replica_num"):
        with pytest.raises(mii.ConfigError, match=rf"{name}=2: .* serve\(\)"):
            mii.pipeline("model", **{name: 2})
    with pytest.raises(mii.UnknownArgument, match="unknown keyword 'deployment_name'"):
        mii.pipeline("model", deployment_name="x")


def test_a_query_in_a_dictionary_is_refused():
    with mii.pipeline(**ECHO) as pipe, pytest.raises(mii.InvalidRequestError, match=r"'query': .* give its list"):
        pipe({"query": ["DeepSpeed is"]})


def test_it_is_destroyed_once_and_for_all():
    pipe = mii.pipeline("", None, False, **ECHO)
    assert pipe.is_rank_0
    pipe.destroy()
    pipe.destroy()
    with pytest.raises(mii.UnavailableError, match="the pipeline is closed"):
        pipe("a")


def test_an_async_pipeline_answers_the_thread_that_asked():
    pipe = mii.async_pipeline({"inference_engine_config": {"engine": "echo", "echo_delay": 0.001}})
    pipe.start()
    first = pipe.put_request("a b", {"stream": True})
    assert [(number, str(piece)) for number, piece in (pipe.get_response(), pipe.get_response())] == [
        (first, "a "),
        (first, "b "),
    ]

    def ask(name, answers):
        numbers = [pipe.put_request(f"{name}{turn}", {}) for turn in range(5)]
        answers[name] = sorted(
            (numbers.index(number), str(answer)) for number, answer in (pipe.get_response() for _ in numbers)
        )

    answers = {}
    threads = [threading.Thread(target=ask, args=(name, answers)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == {name: [(turn, f"{name}{turn} ") for turn in range(5)] for name in "xyz"}
    with pytest.raises(mii.InvalidRequestError, match="top_p"):
        pipe.put_request("a", {"top_p": 2})
    bad = pipe.put_request("", {})
    with pytest.raises(mii.InvalidRequestError, match=f"request {bad}: the prompt is empty"):
        pipe.get_response()
    endless = pipe.put_request("a", {"max_new_tokens": 10**6})
    pipe.flush_uid(endless)
    assert not pipe.is_shutdown()
    pipe.shutdown()
    assert pipe.is_shutdown()
    with pytest.raises(mii.UnavailableError):
        pipe.put_request("a", {})


def test_closing_ends_calls_and_refuses_later_ones():
    pipe = mii.pipeline(**ECHO)
    stream = pipe.stream("a", max_new_tokens=10**6)
    next(stream)
    threading.Thread(target=pipe.close).start()
    with pytest.raises(mii.UnavailableError, match="closed"):
        for _ in stream:
            pass
    with pytest.raises(mii.UnavailableError, match="closed"):
        pipe("a")


def test_an_engine_that_fails_ends_every_call(monkeypatch):
    monkeypatch.setattr("mii_hpc.engine.echo.EchoEngine.run", lambda engine: 1 / 0)
    pipe = mii.pipeline(**ECHO)
    with pytest.raises(mii.UnavailableError, match="has failed: ZeroDivisionError"):
        pipe("a")


@pytest.mark.engine
def test_a_model_answers_as_transformers_does(tmp_path):
    pytest.importorskip("torch")
    from tests.engine.reference import PROMPTS, Reference
    from tests.models import tiny_model

    folder = str(tiny_model(tmp_path))
    reference = Reference(folder)
    with mii.pipeline(folder) as pipe:
        for prompt, answer in zip(PROMPTS, pipe(PROMPTS, do_sample=False, max_new_tokens=12), strict=True):
            assert list(answer.token_ids) == reference.greedy(prompt, max_new_tokens=12)
        assert pipe.tokenizer.decode(pipe.tokenizer("a b")["input_ids"]) == "a b"
        tokenizer = pipe.tokenizer
    with mii.pipeline(folder, tokenizer=tokenizer) as pipe:
        assert pipe.tokenizer is tokenizer
        assert len(pipe("a", max_new_tokens=2, ignore_eos=True)[0].token_ids) == 2


LEAVES_ALONE = """
import os, sys, threading
import torch
import mii_hpc as mii

def state():
    number = []
    fresh = threading.Thread(target=lambda: number.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    return dict(os.environ), torch.get_num_threads(), number, torch.get_default_dtype(), torch.is_grad_enabled()

torch.set_num_threads(3)
before = state()
with mii.pipeline(sys.argv[1], device="cpu", inference_engine_config={"threads": 1}) as pipe:
    assert state() == before
    pipe("a", max_new_tokens=2)
    assert state() == before
assert state() == before
"""


@pytest.mark.engine
def test_a_pipeline_leaves_the_process_as_it_was(tmp_path):
    pytest.importorskip("torch")
    from tests.models import tiny_model

    # Without what torch and DeepSpeed have set in this process.
    own = ("TORCH", "PYTORCH", "DS_", "GOMP_", "GRPC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    script = [sys.executable, "-c", LEAVES_ALONE, str(tiny_model(tmp_path))]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_whatever_ends_the_loading_reaches_the_caller(monkeypatch, stop):
    def load(engine, progress):
        raise stop

    monkeypatch.setattr("mii_hpc.engine.echo.EchoEngine.load", load)
    with pytest.raises(stop):
        mii.pipeline(**ECHO)


def test_threads_share_the_queue_and_lose_nothing():
    engine = {"engine": "echo", "echo_delay": 0.002, "queue_bound": 3, "max_batch_size": 1}
    with mii.pipeline(inference_engine_config=engine) as pipe, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(pipe, [f"{call}-{number}" for number in range(8)]) for call in range(4)]
        for call, answers in enumerate(calls):
            assert [str(answer) for answer in answers.result(PATIENCE)] == [f"{call}-{n} " for n in range(8)]


def test_waiting_for_room_counts_towards_the_timeout():
    engine = {"engine": "echo", "echo_delay": 0.01, "queue_bound": 1}
    with mii.pipeline(inference_engine_config=engine) as pipe:
        for _ in pipe.stream("a", max_new_tokens=10**6):
            with pytest.raises(mii.RequestTimeoutError, match=r"^timeout=0\.05"):
                pipe("b", timeout=0.05)
            break
        assert str(pipe("b", timeout=PATIENCE)[0]) == "b "


def test_what_was_answered_before_the_timeout_is_told():
    with mii.pipeline(**ECHO) as pipe:
        for timeout in (0.5, 5, 50):  # the answers may be slow to come
            with pytest.raises(mii.RequestTimeoutError, match=f"^timeout={timeout}") as caught:
                pipe(["a", "b " * 10**4, "c"], timeout=timeout)
            first, second, third = caught.value.responses
            if isinstance(first, list) and isinstance(third, list):
                break
        assert (str(first[0]), second, str(third[0])) == ("a ", caught.value, "c ")
