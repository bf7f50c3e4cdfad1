"""Log probabilities of answers and prompts, compared with transformers."""

import pytest

torch = pytest.importorskip("torch")

from mii_hpc.engine import scheduling  # noqa: E402
from tests.engine.collect import drained, make, running, submit  # noqa: E402
from tests.engine.reference import Reference, tokenizer_of  # noqa: E402
from tests.models import tiny_model  # noqa: E402

pytestmark = pytest.mark.engine
PROMPT = "The quick brown fox jumps over the lazy dog, and then it goes home. " * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def expected(folder):
    """For each token but the first of some ids: its log probability, and the three most likely tokens."""
    model = Reference(folder)._model

    def of(ids):
        with torch.inference_mode():
            scores = model(torch.tensor([ids], device=model.device)).logits[0, :-1].log_softmax(-1).cpu()
        top = scores.topk(3)
        own = [float(row[token]) for row, token in zip(scores, ids[1:], strict=True)]
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return own, [list(zip(ids, values, strict=True)) for ids, values in pairs]

    return of


def check(answer, ids, expected, index=0):
    pieces = answer.of(index)
    told, tops = pieces[0].prompt_logprobs, pieces[0].prompt_top_logprobs
    own, most = expected([*ids, *answer.token_ids(index)])
    assert told == pytest.approx(own[: len(ids) - 1], abs=2e-3)
    assert not any(piece.prompt_logprobs for piece in pieces[1:])
    tops = [*tops, *(top for piece in pieces for top in piece.top_logprobs)]
    for top, wanted in zip(tops, most, strict=True):
        assert [value for _, value in top] == pytest.approx([value for _, value in wanted], abs=2e-3)
    assert answer.logprobs(index) == pytest.approx(own[len(ids) - 1 :], abs=2e-3)


@pytest.mark.parametrize("most_scores", [7, 256])
def test_prompts_are_scored_whatever_is_computed_at_once(folder, expected, monkeypatch, most_scores):
    monkeypatch.setattr(scheduling, "MOST_SCORES", most_scores)
    ids = tokenizer_of(folder)(PROMPT).input_ids
    options = {"logprobs": True, "top_logprobs": 3, "max_new_tokens": 4, "ignore_eos": True, "stream": True}
    config = {"max_batch_size": 8, "max_batch_tokens": 40, "page_size": 8}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        submit(engine, PROMPT, max_new_tokens=2).wait()  # whose blocks are not shared with those that are scored
        plain = [submit(engine, PROMPT, seed=seed, **options) for seed in range(3)]
        scored = [submit(engine, PROMPT, prompt_logprobs=True, seed=seed, **options) for seed in range(3)]
        twice = submit(engine, PROMPT, prompt_logprobs=True, num_return_sequences=2, seed=1, **options).wait()
        for answer, other in zip(scored, plain, strict=True):
            check(answer.wait(), ids, expected)
            assert answer.token_ids() == other.wait().token_ids()
        check(twice, ids, expected, 0)
        check(twice, ids, expected, 1)
        one = submit(engine, (ids[0],), prompt_logprobs=True, **options).wait()
        assert one.of(0)[0].prompt_logprobs == ()
        drained(engine)


def test_a_prompt_that_is_preempted_is_scored_anew(folder, expected):
    config = {"max_batch_size": 8, "max_batch_tokens": 16, "page_size": 8, "num_blocks": 12}
    ids = tokenizer_of(folder)(PROMPT).input_ids
    options = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": True, "top_logprobs": 3, "stream": True}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        answers = [submit(engine, PROMPT, prompt_logprobs=True, seed=seed, **options) for seed in range(5)]
        for answer in answers:
            check(answer.wait(), ids, expected)
        drained(engine)


def test_penalties_and_biases_reach_the_engine(folder):
    options = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
    with running(make(model_name_or_path=folder)) as engine:
        plain = submit(engine, PROMPT, **options).wait().token_ids()
        other = submit(engine, PROMPT, logit_bias={plain[0]: -100.0}, **options).wait().token_ids()
        forced = submit(engine, PROMPT, logit_bias={9: 100.0}, **options).wait().token_ids()
        varied = submit(engine, PROMPT, logit_bias={9: 100.0}, frequency_penalty=2.0, **options).wait().token_ids()
    assert plain[0] not in other
    assert set(forced) == {9}
    assert set(varied) == {9}  # 24 off 100
