import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from mii_hpc.engine.attention import gather as attention
from mii_hpc.errors import InvalidRequestError
from tests.engine.collect import PATIENCE, make, running, submit
from tests.engine.reference import PROMPTS, Reference
from tests.models import tiny_model

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
    """An engine that notes its steps."""
    engine = make(model_name_or_path=folder, inference_engine_config={**SMALL, **config})
    engine.steps = []
    execute = engine._execute

    def note(step):
        engine.steps.append(step)
        return execute(step)

    engine._execute = note
    return engine


def computed(engine):
    """How many tokens were computed since this was last asked."""
    count = sum(len(part.token_ids) for step in engine.steps for part in step.slices)
    engine.steps.clear()
    return count


def length(engine, prompt):
    return len(engine._model.tokenizer(prompt)["input_ids"])


def drained(engine):
    deadline = time.monotonic() + PATIENCE
    while (stats := engine.stats()).free_blocks < stats.total_blocks or stats.running or stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "gpt_neox"])
def test_a_beginning_seen_before_is_not_computed_again(tmp_path, architecture):
    changes = {"sliding_window": 24} if architecture == "mistral" else {}
    folder = str(tiny_model(tmp_path, architecture, **changes))
    reference = Reference(folder)
    prompts = [SYSTEM + prompt[:20] for prompt in PROMPTS]
    with running(engine_of(folder)) as engine:
        shared = length(engine, SYSTEM) // PAGE * PAGE
        for number, prompt in enumerate([*prompts, *prompts]):
            expected = reference.greedy(prompt, **GREEDY)
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == expected
            count = length(engine, prompt) + len(expected) - 1
            assert computed(engine) <= count - (shared if number else 0)
        drained(engine)


def test_answers_are_the_same_however_little_is_left(folder, reference):
    with running(engine_of(folder)) as engine:
        ids = engine._model.tokenizer(SYSTEM)["input_ids"]
        for end in range(2 * PAGE - 1, 3 * PAGE + 2):
            prompt = engine._model.tokenizer.decode(ids[:end])
            assert length(engine, prompt) == end
            expected = reference.greedy(prompt, **GREEDY)
            for _ in range(2):
                assert submit(engine, prompt, **GREEDY).wait().token_ids() == expected
            engine.steps.clear()
            submit(engine, prompt, do_sample=False, max_new_tokens=1).wait()
            assert computed(engine) == (end - 1) % PAGE + 1


@pytest.mark.parametrize("kernel", [True, False])
def test_prompts_that_come_together_share_in_the_step_that_computes_them(folder, reference, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(attention, "compile_kernel", lambda dtype: None)
    engine = engine_of(folder, max_batch_tokens=512, max_batch_size=64)
    engine.load(lambda sentence: None)
    ids = engine._model.tokenizer(SYSTEM)["input_ids"]
    decode = engine._model.tokenizer.decode
    # Among the rests are some of a single token, as if it were generated.
    prompts = [SYSTEM + PROMPTS[1], *(decode(ids[:end]) for end in range(PAGE, len(ids), 3)), SYSTEM + PROMPTS[0]]
    answers = [submit(engine, prompt, **GREEDY) for prompt in prompts]
    deadline = time.monotonic() + PATIENCE
    while len(engine._arrived) < len(answers):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        first = engine.steps[0]
        assert len(first.slices) == len(prompts)
        assert len(first.slices[0].token_ids) == 1
        rest = sum(len(part.token_ids) for part in first.slices)
        assert rest < length(engine, prompts[0]) + PAGE * len(prompts) + length(engine, PROMPTS[0])
        drained(engine)
    finally:
        engine.close()
        thread.join(PATIENCE)


def test_several_answers_to_one_prompt_compute_it_once(folder):
    options = {"num_return_sequences": 8, "seed": 3, "max_new_tokens": 10, "ignore_eos": True}
    with running(engine_of(folder, prefix_sharing=False)) as engine:
        expected = submit(engine, SYSTEM, **options).wait()
        count = length(engine, SYSTEM)
        assert computed(engine) == 8 * (count + 9)
    with running(engine_of(folder)) as engine:
        answer = submit(engine, SYSTEM, **options).wait()
        assert computed(engine) == count + 7 * ((count - 1) % PAGE + 1) + 8 * 9
    for index in range(8):
        assert answer.token_ids(index) == expected.token_ids(index)


def test_an_answer_is_the_beginning_of_the_next_prompt(folder, reference):
    expected = reference.greedy(SYSTEM, **{**GREEDY, "max_new_tokens": 40})
    with running(engine_of(folder)) as engine:
        assert submit(engine, SYSTEM, **GREEDY).wait().token_ids() == expected[:20]
        ids = engine._model.tokenizer(SYSTEM)["input_ids"] + expected[:20]
        # Its text need not have the same tokens.
        engine._model = replace(engine._model, tokenizer=lambda text: {"input_ids": ids})
        engine.steps.clear()
        assert submit(engine, "", **GREEDY).wait().token_ids() == expected[20:]
        assert computed(engine) == (len(ids) - 1) % PAGE + 1 + 19


def test_without_prefix_sharing_everything_is_computed(folder, reference):
    with running(engine_of(folder, prefix_sharing=False)) as engine:
        for _ in range(2):
            assert submit(engine, SYSTEM, **GREEDY).wait().token_ids() == reference.greedy(SYSTEM, **GREEDY)
            assert computed(engine) == length(engine, SYSTEM) + 19


def test_a_cache_too_small_for_all_loses_nobody(folder, reference):
    prompts = [SYSTEM + PROMPTS[number % 5][: 4 * number] for number in range(16)]
    with running(engine_of(folder, num_blocks=17)) as engine:
        interrupted = []
        give_back = engine._scheduler._give_back

        def note(sequence):
            if sequence.computed and not sequence.answer.ended:
                interrupted.append(sequence)
            give_back(sequence)

        engine._scheduler._give_back = note
        answers = [submit(engine, prompt, **GREEDY) for prompt in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        assert interrupted
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


def bad_text(engine, text, prompt):
    """The prompt with the bad token in it."""
    result = text + engine._model.tokenizer.decode([BAD]) + prompt
    assert BAD in engine._model.tokenizer(result)["input_ids"]
    return result


@pytest.mark.parametrize("kernel", [True, False])
def test_what_is_not_finite_stays_with_its_request(poisoned, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(attention, "compile_kernel", lambda dtype: None)
    reference = Reference(poisoned)
    options = {**GREEDY, "max_new_tokens": 80}
    with running(engine_of(poisoned, num_blocks=40)) as engine:
        good = [submit(engine, SYSTEM + text, stream=True, **options) for text in ("one", "two")]
        for answer in good:
            assert answer.began.wait(PATIENCE)
        # The first two begin as the good ones do, and the last two have the bad token in their first block.
        texts = [bad_text(engine, SYSTEM, SYSTEM)] * 2 + [bad_text(engine, "", SYSTEM)] * 2
        for answer in [submit(engine, text) for text in texts]:
            with pytest.raises(InvalidRequestError, match="not finite"):
                answer.wait()
        later = [submit(engine, prompt, **GREEDY) for prompt in (SYSTEM, *PROMPTS)]
        for text, answer in zip(("one", "two"), good, strict=True):
            assert answer.wait().token_ids() == reference.greedy(SYSTEM + text, **options)
        for prompt, answer in zip((SYSTEM, *PROMPTS), later, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **GREEDY)
        drained(engine)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_what_is_not_finite_goes_with_a_prompt_that_is_cancelled(poisoned, kernel, prefix_sharing, monkeypatch):
    if not kernel:
        monkeypatch.setattr(attention, "compile_kernel", lambda dtype: None)
    reference = Reference(poisoned)
    engine = engine_of(poisoned, num_blocks=16, prefix_sharing=prefix_sharing)
    with running(engine):
        note = engine._execute

        def cancel(step):
            engine.cancel("bad")
            return note(step)

        engine._execute = cancel
        prompt = bad_text(engine, "", SYSTEM)
        assert length(engine, prompt) > SMALL["max_batch_tokens"]
        submit(engine, prompt, id="bad")
        drained(engine)
        assert [part.sample for step in engine.steps for part in step.slices] == [False]
        engine._execute = note
        for prompt in PROMPTS:
            assert submit(engine, prompt, **GREEDY).wait().token_ids() == reference.greedy(prompt, **GREEDY)
