import subprocess
import sys

import pytest

from mii_hpc.errors import InvalidRequestError, QueueFullError
from mii_hpc.generation import Chat
from tests.engine.collect import make, running, submit
from tests.waiting import PATIENCE


def echo(**config):
    return running(make(inference_engine_config={"engine": "echo", **config}))


def test_it_answers_with_the_prompts_words_once():
    with echo() as engine:
        answer = submit(engine, "to be  or\nnot").wait()
    assert answer.text() == "to be or not "
    assert answer.token_ids() == list(engine.codec.encode("to be or not"))
    assert answer.finish_reason() == "stop"
    assert answer.pieces[-1].prompt_length == answer.pieces[-1].generated_length == 4


def test_what_reports_tells_its_first_token_at_once():
    with echo() as engine:
        answer = submit(engine, "to be or not", reports=True).wait()
    assert answer.pieces[0].generated_text == "to "
    assert (answer.text(), len(answer.token_ids())) == ("to be or not ", 4)


def test_token_ids_and_conversations_are_prompts_too():
    with echo() as engine:
        token_ids = engine.codec.encode("to be")
        assert submit(engine, (*token_ids, 7)).wait().text() == "to be 7 "
        talk = Chat(({"role": "user", "content": "to be"}, {"role": "assistant", "content": None}))
        assert submit(engine, talk).wait().text() == "user: to be assistant: "


def test_it_repeats_up_to_the_bound():
    with echo() as engine:
        by_new = submit(engine, "to be", max_new_tokens=5).wait()
        by_length = submit(engine, "to be", max_length=5).wait()
    assert by_new.text() == "to be to be to "
    assert by_length.text() == "to be to "
    assert by_new.finish_reason() == by_length.finish_reason() == "length"


def test_a_stream_has_a_piece_per_token_and_joins_to_the_unary_answer():
    with echo() as engine:
        stream = submit(engine, "a b c STOP d", stream=True, stop="c STOP").wait()
        unary = submit(engine, "a b c STOP d", stop="c STOP").wait()
    assert stream.text() == unary.text() == "a b "
    assert [len(piece.token_ids) for piece in stream.pieces] == [1, 1, 1, 1]
    assert len(unary.pieces) == 1
    assert unary.finish_reason() == "stop"


def test_full_text_logprobs_and_several_sequences():
    with echo() as engine:
        answer = submit(engine, "a b", return_full_text=True, logprobs=True, num_return_sequences=3, stream=True).wait()
    assert [answer.text(index) for index in range(3)] == ["a ba b "] * 3
    assert answer.logprobs(2) == [0.0, 0.0]


def test_requests_run_concurrently():
    with echo(echo_delay=0.01) as engine:
        endless = [submit(engine, "a", max_new_tokens=10**6, stream=True) for _ in range(20)]
        assert submit(engine, "a b c d").wait().text() == "a b c d "
        assert engine.stats().running == 20
        for answer in endless:
            assert answer.began.wait(PATIENCE)
            engine.cancel(answer.id)


def test_cancel_silences_a_request_and_frees_it():
    with echo(echo_delay=0.01) as engine:
        answer = submit(engine, "a", max_new_tokens=10**6, stream=True)
        assert answer.began.wait(PATIENCE)
        engine.cancel(answer.id)
        count = len(answer.pieces)
        assert engine.stats().running == 0
        submit(engine, "a b c").wait()
        assert len(answer.pieces) == count
        engine.cancel("unknown")


def test_past_the_bound_a_request_is_refused_with_the_queues_length():
    engine = make(inference_engine_config={"engine": "echo", "queue_bound": 2})
    waiting = [submit(engine, "a"), submit(engine, "b")]
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        submit(engine, "c")
    assert engine.stats().waiting == 2
    with running(engine):
        for answer in waiting:
            answer.wait()
    assert engine.stats().generated_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [("", {}, "empty"), (" \n", {}, "empty"), ("a b c", {"max_length": 3}, "3 tokens.* is 3")],
)
def test_a_bad_request_fails_alone(prompt, options, reason):
    with echo(echo_delay=0.01) as engine:
        good = submit(engine, "a b c d e f")
        with pytest.raises(InvalidRequestError, match=reason):
            submit(engine, prompt, **options).wait()
        assert good.wait().text() == "a b c d e f "


def test_it_needs_no_torch():
    code = "import sys, mii_hpc.engine.echo; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0
