"""A request that is interrupted anywhere, and goes on, gives what it would have given undisturbed."""

import random
from importlib.util import find_spec

import pytest

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.errors import InvalidRequestError, QueueFullError
from mii_hpc.generation import GenerationRequest, Received, Response, ResumedAnswer, joined
from tests.engine.collect import drained, make, running, submit

GRAMMARS = [
    {"regex": "([a-f ]|🙂|é){3,30}"},
    {"json": {"enum": ["für", "🙂🚀", "a b c d e f"], "x-guidance": {"whitespace_pattern": " "}}},
    {"choice": [" yes", "no", "🙂 or"]},
]
PROMPTS = ["Hello there, how are", "def f(x):\n    return 🙂", "The quick brown fox jumps over it " * 3, "Für €5 🚀 🙂"]


@pytest.fixture(scope="module", params=["echo", "tokens known at once", "tokens known late"])
def engine(request, tmp_path_factory):
    if request.param == "echo":
        with running(make(inference_engine_config={"engine": "echo"})) as engine:
            yield engine
        return
    torch = pytest.importorskip("torch")
    from mii_hpc.engine import batching
    from tests.engine.late import LateSampling
    from tests.models import tiny_model

    folder = str(tiny_model(tmp_path_factory.mktemp("llama"), eos_token_id=[1, *range(60, 66)]))
    if request.param == "tokens known late" and torch.cuda.is_available():
        pytest.skip("what is drawn on a GPU is known late by itself")
    config = {"max_batch_size": 64, "page_size": 8, "max_batch_tokens": 128}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tokens known late":
            patch.setattr(batching, "create_sampling", LateSampling)
        with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
            yield engine
            drained(engine)


def drawn_options(draw, engine):
    options = {
        "max_new_tokens": draw.randint(2, 40),
        "seed": draw.randrange(2**62),
        "stream": True,
        "logprobs": draw.random() < 0.5,
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3]),
        "frequency_penalty": draw.choice([0.0, 0.0, 1.0]),
        "presence_penalty": draw.choice([0.0, 0.0, 1.0]),
        "logit_bias": draw.choice([{}, {70: 3.0, 100: 2.0}]),
        "return_full_text": draw.random() < 0.2,
        "ignore_eos": draw.random() < 0.5,
        "skip_special_tokens": draw.random() < 0.7,
    }
    if draw.random() < 0.3:
        options["do_sample"] = False
    else:
        options |= {"temperature": draw.choice([0.7, 1.0, 2.0]), "top_p": draw.choice([0.5, 0.9, 1.0])}
        options["num_return_sequences"] = draw.choice([1, 1, 1, 3])
    if options["logprobs"]:
        options |= {"top_logprobs": draw.choice([0, 2]), "prompt_logprobs": draw.random() < 0.5}
    if draw.random() < 0.3:
        options["min_new_tokens"] = draw.randint(0, options["max_new_tokens"])
    if draw.random() < 0.4 and engine.tokenizer and find_spec("llguidance"):
        options["structured_outputs"] = draw.choice(GRAMMARS)
    return options


def assert_same(pieces, expected, case):
    assert joined(pieces) == joined(expected), case
    for answer, other in zip(joined(pieces), joined(expected), strict=True):
        assert (answer.index, answer.token_ids) == (other.index, other.token_ids), case
        # Numbers of another batch differ in their last bits.
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-3), case
        assert answer.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=1e-3), case
        assert len(answer.top_logprobs) == len(other.top_logprobs), case


def test_whatever_the_request_and_wherever_it_is_cut(engine):
    draw = random.Random(7)
    requests = [(draw.choice(PROMPTS), drawn_options(draw, engine)) for _ in range(60)]
    plain = [submit(engine, prompt, **options) for prompt, options in requests]
    for (_, options), answer in zip(requests, plain, strict=True):
        text = answer.wait().text()
        if len(text) > 6 and draw.random() < 0.5:  # a stop string that comes, or only begins to
            start = draw.randrange(len(text) - 5)
            options["stop"] = (text[start : start + draw.randint(1, 5)], text[start : start + 4] + "never")
    undisturbed = [submit(engine, prompt, **options) for prompt, options in requests]
    cuts = []
    for (prompt, options), answer in zip(requests, undisturbed, strict=True):
        before = answer.wait().pieces[: draw.randrange(len(answer.pieces))]
        cuts.append((before, resumed(engine, prompt, options, before)))
    twice = []
    for (prompt, options), answer, (before, after) in zip(requests, undisturbed, cuts, strict=True):
        assert_same(before + after.wait().pieces, answer.pieces, (prompt, options))
        before = before + after.pieces[: draw.randrange(len(after.pieces))]
        twice.append((before, resumed(engine, prompt, options, before)))
    for (prompt, options), answer, (before, after) in zip(requests, undisturbed, twice, strict=True):
        assert_same(before + after.wait().pieces, answer.pieces, (prompt, options))


def resumed(engine, prompt, options, pieces):
    received = Received(options.get("num_return_sequences", 1))
    for piece in pieces:
        received.take(piece)
    return submit(engine, prompt, resume=received.resume, **options)


def test_at_every_token_of_text_that_is_cut_in_characters_and_stop_strings(engine):
    options = {"seed": 5, "max_new_tokens": 30, "ignore_eos": True, "stream": True, "temperature": 1.5}
    prompt = "🚀 🙂 für €5 " * 3
    text = submit(engine, prompt, **options).wait().text()
    options["stop"] = (text[8:12] + "never", text[-2:])
    answer = submit(engine, prompt, **options).wait()
    for cut in range(len(answer.pieces)):
        after = resumed(engine, prompt, options, answer.pieces[:cut]).wait()
        assert_same(answer.pieces[:cut] + after.pieces, answer.pieces, cut)


def test_characters_that_were_not_delivered_are(engine):
    options = {"do_sample": False, "max_new_tokens": 8, "ignore_eos": True, "stream": True}
    answer = submit(engine, "x y", **options).wait()
    token_ids = tuple(answer.token_ids()[:4])
    after = submit(engine, "x y", resume=(ResumedAnswer(token_ids, 0),), **options).wait()
    assert after.text() == answer.text()
    assert after.token_ids() == answer.token_ids()[4:]


def test_what_a_grammar_does_not_have_cannot_go_on(engine):
    if not engine.tokenizer:
        with pytest.raises(InvalidRequestError, match="the echo engine repeats its prompt"):
            submit(engine, "x", structured_outputs={"choice": ["a"]}).wait()
        return
    pytest.importorskip("llguidance")
    (other,) = engine.tokenizer("b")["input_ids"]
    with pytest.raises(InvalidRequestError, match=r"^structured_outputs: .*doesn't satisfy the grammar"):
        submit(engine, "x", resume=(ResumedAnswer((other,), 0),), structured_outputs={"choice": ["aa"]}).wait()


def test_what_cannot_go_on_is_refused(engine):
    ended = ResumedAnswer((), 0, True)
    for resume in ((ended,), (ResumedAnswer(),) * 2):
        with pytest.raises(InvalidRequestError, match=r"^resume: must have 1 answer\(s\)"):
            submit(engine, "x", resume=resume)
    answer = submit(engine, "x y", do_sample=False, max_new_tokens=3, ignore_eos=True).wait()
    for more in ((), (7,)):
        everything = ResumedAnswer((*answer.token_ids(), *more), 0)
        with pytest.raises(InvalidRequestError, match=r"^resume: answer 0 has ended with its token 3$"):
            submit(engine, "x y", resume=(everything,), do_sample=False, max_new_tokens=3, ignore_eos=True).wait()


def test_what_was_admitted_once_is_not_refused_by_a_full_queue():
    engine = make(inference_engine_config={"engine": "echo", "queue_bound": 1})
    waiting = [submit(engine, "a"), submit(engine, "b", resume=(ResumedAnswer(),), admitted=True)]
    assert engine.stats().waiting == 2
    with pytest.raises(QueueFullError):
        submit(engine, "c", resume=(ResumedAnswer(),))
    with running(engine):
        for answer in waiting:
            answer.wait()


def test_what_was_received_says_where_to_go_on():
    received = Received(2)
    assert received.resume == (ResumedAnswer(),) * 2
    received.take(Response("ab", token_ids=(1, 2), index=1))
    received.take(Response("é", token_ids=(3,), index=1))
    assert received.resume == (ResumedAnswer(), ResumedAnswer((1, 2, 3), 3))
    received.take(Response("", finish_reason="stop", index=0))
    assert (received.resume[0].ended, received.ended) == (True, False)
    again = Received(2, received.resume)
    assert again.resume == received.resume
    again.take(Response("", finish_reason="stop", index=1))
    assert again.ended


def test_what_has_waited_elsewhere_is_before_those_that_wait_here():
    engine = make(inference_engine_config={"engine": "echo", "max_batch_size": 1})
    order = []
    for word, resume in (("first", ()), ("second", ()), ("moved", (ResumedAnswer(),))):
        request = GenerationRequest(word, word, GenerateParamsConfig(), resume, admitted=bool(resume))
        engine.submit(request, lambda piece: order.append(piece.generated_text))
    with running(engine):
        submit(engine, "last").wait()
    assert order == ["moved ", "first ", "second "]
