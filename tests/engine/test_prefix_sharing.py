import logging

import pytest

pytest.importorskip("torch")

from mii_hpc.engine.runner import ModelRunner
from mii_hpc.errors import InvalidRequestError
from tests.engine.collect import drained, make, running, submit
from tests.engine.reference import PROMPTS, Reference, tokenizer_of
from tests.models import tiny_model
from tests.waiting import PATIENCE

pytestmark = pytest.mark.engine
PAGE = 8
SMALL = {"max_batch_size": 8, "max_batch_tokens": 40, "page_size": PAGE}
SYSTEM = "You answer as a pirate would, in short sentences and without a single number. " * 2
GREEDY = {"do_sample": False, "max_new_tokens": 20, "ignore_eos": True}
BAD = 4  # a token, "#", whose embedding is not finite, in the poisoned model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path_factory.mktemp("poisoned"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def engine_of(folder, **config):
    return make(model_name_or_path=folder, inference_engine_config={**SMALL, **config})


def computed(steps):
    """How many tokens were computed since this was last asked."""
    count = sum(len(part.token_ids) for step in steps for part in step.slices)
    steps.clear()
    return count


@pytest.fixture(scope="module")
def ids(folder):
    """The token ids of a text."""
    tokenizer = tokenizer_of(folder)
    return lambda text: tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def text(folder):
    """The text of token ids."""
    return tokenizer_of(folder).decode


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt_neox"])
def test_a_beginning_seen_before_is_not_computed_again(tmp_path, architecture, steps, ids):
    changes = {"sliding_window": 24} if architecture == "mistral" else {}
    folder = str(tiny_model(tmp_path, architecture, **changes))
    reference = Reference(folder)
    prompts = [SYSTEM + prompt[:20] for prompt in PROMPTS]
    with running(engine_of(folder)) as engine:
        shared = len(ids(SYSTEM)) // PAGE * PAGE
        for number, prompt in enumerate([*prompts, *prompts]):
            expected = reference.greedy(prompt, **GREEDY)
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == expected
            count = len(ids(prompt)) + len(expected) - 1
            assert computed(steps) <= count - (shared if number else 0)
        drained(engine)


def test_answers_are_the_same_however_little_is_left(folder, reference, steps, ids, text):
    with running(engine_of(folder)) as engine:
        for end in range(2 * PAGE - 1, 3 * PAGE + 2):
            prompt = text(ids(SYSTEM)[:end])
            assert len(ids(prompt)) == end
            expected = reference.greedy(prompt, **GREEDY)
            for _ in range(2):
                assert submit(engine, prompt, **GREEDY).wait().token_ids() == expected
            steps.clear()
            submit(engine, prompt, do_sample=False, max_new_tokens=1).wait()
            assert computed(steps) == (end - 1) % PAGE + 1


@pytest.mark.parametrize("attention", ["auto", "gather"])
def test_prompts_that_come_together_share_in_the_step_that_computes_them(
    folder, reference, attention, steps, ids, text
):
    engine = engine_of(folder, max_batch_tokens=512, max_batch_size=64, attention=attention)
    # Among the rests are some of a single token, as if it were generated.
    ends = range(PAGE, len(ids(SYSTEM)), 3)
    prompts = [SYSTEM + PROMPTS[1], *(text(ids(SYSTEM)[:end]) for end in ends), SYSTEM + PROMPTS[0]]
    answers = []

    def ask():
        answers.extend(submit(engine, prompt, **GREEDY) for prompt in prompts)
        # Prompts are tokenised one after the other: when this one is refused, all of them are ready.
        with pytest.raises(InvalidRequestError):
            submit(engine, "x" * 10_000).wait()

    with running(engine, ask):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        first = steps[0]
        assert len(first.slices) == len(prompts)
        assert len(first.slices[0].token_ids) == 1
        rest = sum(len(part.token_ids) for part in first.slices)
        assert rest < len(ids(prompts[0])) + PAGE * len(prompts) + len(ids(PROMPTS[0]))
        drained(engine)


def test_several_answers_to_one_prompt_compute_it_once(folder, steps, ids):
    options = {"num_return_sequences": 8, "seed": 3, "max_new_tokens": 10, "ignore_eos": True}
    with running(engine_of(folder, prefix_sharing=False)) as engine:
        expected = submit(engine, SYSTEM, **options).wait()
        count = len(ids(SYSTEM))
        assert computed(steps) == 8 * (count + 9)
    with running(engine_of(folder)) as engine:
        answer = submit(engine, SYSTEM, **options).wait()
        assert computed(steps) == count + 7 * ((count - 1) % PAGE + 1) + 8 * 9
    for index in range(8):
        assert answer.token_ids(index) == expected.token_ids(index)


def test_an_answer_is_the_beginning_of_the_next_prompt(folder, reference, steps, ids):
    expected = reference.greedy(SYSTEM, **{**GREEDY, "max_new_tokens": 40})
    with running(engine_of(folder)) as engine:
        assert submit(engine, SYSTEM, **GREEDY).wait().token_ids() == expected[:20]
        prompt = ids(SYSTEM) + expected[:20]
        steps.clear()
        # As ids: its text need not have the same tokens.
        assert submit(engine, tuple(prompt), **GREEDY).wait().token_ids() == expected[20:]
        assert computed(steps) == (len(prompt) - 1) % PAGE + 1 + 19


def test_without_prefix_sharing_everything_is_computed(folder, reference, steps, ids):
    with running(engine_of(folder, prefix_sharing=False)) as engine:
        for _ in range(2):
            assert submit(engine, SYSTEM, **GREEDY).wait().token_ids() == reference.greedy(SYSTEM, **GREEDY)
            assert computed(steps) == len(ids(SYSTEM)) + 19


def test_a_cache_too_small_for_all_loses_nobody(folder, reference, caplog):
    prompts = [SYSTEM + PROMPTS[number % 5][: 4 * number] for number in range(16)]
    with caplog.at_level(logging.DEBUG, "mii_hpc.engine"), running(engine_of(folder, num_blocks=17)) as engine:
        answers = [submit(engine, prompt, **GREEDY) for prompt in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        assert "preempted" in caplog.text
        drained(engine)


def test_a_cancellation_takes_nothing_from_those_who_share(folder, reference):
    options = {**GREEDY, "max_new_tokens": 60, "stream": True}
    prompts = [SYSTEM + text for text in ("one", "two", "three", "four")]
    with running(engine_of(folder)) as engine:
        answers = [submit(engine, prompt, **options) for prompt in prompts]
        for answer in answers:
            assert answer.began.wait(PATIENCE)
        for answer in answers[::2]:
            engine.cancel(answer.id)
        others = [submit(engine, prompt, **options) for prompt in PROMPTS]
        for prompt, answer in [*zip(prompts[1::2], answers[1::2], strict=True), *zip(PROMPTS, others, strict=True)]:
            assert answer.wait().token_ids() == reference.greedy(prompt, **options)
        drained(engine)


@pytest.fixture(scope="module")
def bad(ids, text):
    """The text of the bad token."""
    assert BAD in ids(SYSTEM + text([BAD]) + SYSTEM)
    assert BAD in ids(text([BAD]) + SYSTEM)
    return text([BAD])


@pytest.mark.parametrize("attention", ["auto", "gather"])
def test_what_is_not_finite_stays_with_its_request(poisoned, attention, bad):
    reference = Reference(poisoned)
    options = {**GREEDY, "max_new_tokens": 80}
    with running(engine_of(poisoned, num_blocks=40, attention=attention)) as engine:
        good = [submit(engine, SYSTEM + text, stream=True, **options) for text in ("one", "two")]
        for answer in good:
            assert answer.began.wait(PATIENCE)
        # The first two begin as the good ones do, and the last two have the bad token in their first block.
        texts = [SYSTEM + bad + SYSTEM] * 2 + [bad + SYSTEM] * 2
        for answer in [submit(engine, text) for text in texts]:
            with pytest.raises(InvalidRequestError, match="not finite"):
                answer.wait()
        later = [submit(engine, prompt, **GREEDY) for prompt in (SYSTEM, *PROMPTS)]
        for text, answer in zip(("one", "two"), good, strict=True):
            assert answer.wait().token_ids() == reference.greedy(SYSTEM + text, **options)
        for prompt, answer in zip((SYSTEM, *PROMPTS), later, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        drained(engine)


@pytest.mark.parametrize("attention", ["auto", "gather"])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_what_is_not_finite_goes_with_a_prompt_that_is_cancelled(
    poisoned, attention, prefix_sharing, steps, ids, bad, monkeypatch
):
    reference = Reference(poisoned)
    engine = engine_of(poisoned, num_blocks=16, prefix_sharing=prefix_sharing, attention=attention)
    execute = ModelRunner.execute

    def cancel(runner, step):
        engine.cancel("bad")
        return execute(runner, step)

    monkeypatch.setattr(ModelRunner, "execute", cancel)
    with running(engine):
        assert len(ids(bad + SYSTEM)) > SMALL["max_batch_tokens"]
        submit(engine, bad + SYSTEM, id="bad")
        drained(engine)
        assert [part.sample for step in steps for part in step.slices] == [False]
        for prompt in PROMPTS:
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == reference.greedy(prompt, **GREEDY)
