import asyncio
import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mii_hpc.engine import batching
from mii_hpc.engine.tokenizer import Tokenizer
from mii_hpc.errors import InvalidRequestError, QueueFullError
from mii_hpc.generation import GUEST, OWNER
from tests.engine.collect import drained, make, running, submit
from tests.engine.late import know_tokens_late
from tests.engine.reference import PROMPTS, Reference, option_sets, tokenizer_of
from tests.models import CONTEXT, replace_tokenizer_by_sentencepiece, tiny_model
from tests.waiting import PATIENCE, eventually, until

pytestmark = pytest.mark.engine
SMALL = {"max_batch_size": 8, "max_batch_tokens": 40, "page_size": 8}
LONG = "The quick brown fox jumps over the lazy dog. " * 4
# Windows are shorter than the texts. Gemma 2 has a softcap, gpt-oss has sinks.
CHANGES = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": 24, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("llama"))
    path = Path(folder) / "generation_config.json"
    # Many ends, so that answers of a random model do come to one.
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, *range(60, 80)]}))
    return str(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder)


@pytest.fixture(scope="module", params=[False, True], ids=["tokens known at once", "tokens known late"])
def engine(folder, request):
    config = {"max_batch_size": 64, "page_size": 8, "max_batch_tokens": 128}
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            know_tokens_late(patch)
        with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
            yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        drained(engine)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "opt", "gpt_neox", "gemma2", "gpt_oss"])
def test_greedy_answers_are_generates_own(tmp_path, architecture):
    folder = str(tiny_model(tmp_path, architecture, **CHANGES.get(architecture, {})))
    reference = Reference(folder)
    with running(make(model_name_or_path=folder, inference_engine_config=SMALL)) as engine:
        answers = [submit(engine, prompt, do_sample=False, max_new_tokens=30) for prompt in PROMPTS]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = reference.greedy(prompt, max_new_tokens=30)
            assert answer.wait().token_ids() == expected
            assert answer.text() == reference.decode(expected)


def test_64_option_sets_in_one_batch(engine, reference):
    requests = option_sets()
    answers = [submit(engine, prompt, **options) for prompt, options in requests]
    for (prompt, options), answer in zip(requests, answers, strict=True):
        answer.wait()
        if not options.get("do_sample", True):
            assert answer.token_ids() == reference.greedy(prompt, **options), options
    again = [submit(engine, prompt, **options) for prompt, options in reversed(requests)]
    for (_, options), answer, other in zip(requests, answers, reversed(again), strict=True):
        assert other.wait().token_ids() == answer.token_ids(), options
    for (prompt, options), answer in list(zip(requests, answers, strict=True))[::5]:
        assert submit(engine, prompt, **options).wait().token_ids() == answer.token_ids(), options


def test_a_stream_joins_to_the_unary_answer(engine, reference):
    for seed in range(8):
        options = {"seed": seed, "temperature": 2.0, "max_new_tokens": 40, "ignore_eos": True}
        unary = submit(engine, "Stream 🙂", **options).wait()
        stream = submit(engine, "Stream 🙂", stream=True, **options).wait()
        assert stream.text() == unary.text() == reference.decode(unary.token_ids())
        assert stream.token_ids() == unary.token_ids()
        assert len(stream.pieces) == 40
        reported = submit(engine, "Stream 🙂", reports=True, **options).wait()
        assert (reported.text(), reported.token_ids()) == (stream.text(), stream.token_ids())
        assert len(reported.pieces[0].token_ids) == 1
        assert all(piece.generated_text.encode("utf-8") is not None for piece in stream.pieces)


def test_a_stop_string_across_tokens_ends_the_answer_before_it(engine):
    options = {"do_sample": False, "max_new_tokens": 40, "ignore_eos": True}
    whole = submit(engine, "Stop", **options).wait()
    pieces = submit(engine, "Stop", stream=True, **options).wait().pieces
    texts = [piece.generated_text for piece in pieces]
    first = next(i for i in range(5, 35) if all(texts[i : i + 3]) and "\ufffd" not in "".join(texts[i : i + 3]))
    stop = texts[first][-1] + texts[first + 1] + texts[first + 2][0]
    expected = whole.text()[: whole.text().index(stop)]
    for stream in (True, False):
        answer = submit(engine, "Stop", stop=["never", stop], stream=stream, **options).wait()
        assert answer.text() == expected
        assert answer.finish_reason() == "stop"


def test_lengths_and_reasons(engine):
    bounded = submit(engine, "a", do_sample=False, max_new_tokens=5, ignore_eos=True).wait()
    assert bounded.finish_reason() == "length"
    assert bounded.pieces[-1].generated_length == 5
    for options in ({"max_new_tokens": 10**6}, {"max_length": 10**6}, {}):
        last = submit(engine, "a", do_sample=False, ignore_eos=True, **options).wait().pieces[-1]
        assert last.prompt_length + last.generated_length == CONTEXT
        assert last.finish_reason == "length"


def test_the_models_max_length_is_every_requests(folder):
    with running(make(model_name_or_path=folder, max_length=40, inference_engine_config=SMALL)) as engine:
        for options in ({}, {"max_length": 200}, {"max_new_tokens": 200}):
            last = submit(engine, "a", ignore_eos=True, **options).wait().pieces[-1]
            assert last.prompt_length + last.generated_length == 40
        shorter = submit(engine, "a", max_length=20, ignore_eos=True).wait().pieces[-1]
        assert shorter.prompt_length + shorter.generated_length == 20
        with pytest.raises(InvalidRequestError, match="the bound on prompt plus answer is 40"):
            submit(engine, LONG).wait()


def test_temperature_0_is_greedy(engine, reference):
    for prompt in PROMPTS:
        answer = submit(engine, prompt, temperature=0, max_new_tokens=20).wait()
        assert answer.token_ids() == reference.greedy(prompt, max_new_tokens=20)


def test_several_sequences_each_have_a_seed(engine):
    many = submit(engine, "Many", num_return_sequences=4, seed=11, max_new_tokens=12, ignore_eos=True).wait()
    assert len({tuple(many.token_ids(index)) for index in range(4)}) == 4
    for index in range(4):
        alone = submit(engine, "Many", seed=11 + index, max_new_tokens=12, ignore_eos=True).wait()
        assert alone.token_ids() == many.token_ids(index)


def test_full_text_and_logprobs(engine):
    answer = submit(engine, "Full 🙂", do_sample=False, max_new_tokens=6, return_full_text=True, logprobs=True).wait()
    assert answer.text().startswith("Full 🙂")
    assert len(answer.logprobs()) == len(answer.token_ids())
    assert all(value <= 0 for value in answer.logprobs())


def test_full_text_keeps_the_space_that_a_sentencepiece_tokenizer_drops_before_a_text(tmp_path):
    folder = tiny_model(tmp_path)
    replace_tokenizer_by_sentencepiece(folder)
    prompts = ["the value of", "x", "Für €5 🚀"]  # the last ends in tokens of single bytes
    with running(make(model_name_or_path=str(folder), inference_engine_config=SMALL)) as engine:
        tokenizer = engine.tokenizer
        answers = [
            (prompt, submit(engine, prompt, seed=seed, max_new_tokens=6, return_full_text=True, stream=stream).wait())
            for prompt in prompts
            for seed in range(20)
            for stream in (True, False)
        ]
    first_tokens = [tokenizer.convert_ids_to_tokens(answer.token_ids()[0]) for _, answer in answers]
    assert any(token.startswith("▁") for token in first_tokens)
    for (prompt, answer), first in zip(answers, first_tokens, strict=True):
        if not first.startswith("<0x"):  # bytes after the bytes of an emoji make all of them replacement characters
            whole = [*tokenizer(prompt)["input_ids"], *answer.token_ids()]
            assert answer.text() == tokenizer.decode(whole, skip_special_tokens=True)


POISON = [
    ("x" * 1_000_000, {}, "the prompt has 1000000 bytes, and "),
    ("\N{LATIN SMALL LETTER AE}" * 600, {}, "tokens, the"),
    (LONG * 20, {"max_new_tokens": 1}, f"the bound on prompt plus answer is {CONTEXT}"),
    ("\ud800 lone surrogate", {}, "cannot be tokenised"),
    ("a b c d", {"max_length": 2}, "max_length is 2"),
]
HARMLESS = [
    ("", {}),
    ("\x00\n\u202e", {"top_k": 2**31 - 1}),
    ("a", {"temperature": 1e-30}),
    ("a", {"max_length": 2**31 - 1}),
    ("a", {"temperature": 100.0, "top_p": 1.0}),
    ("a", {"top_p": 1e-30}),
    ("a", {"repetition_penalty": 1e-30}),
    ("a", {"stop": ["a" * 1024] * 64}),
    ("a", {"seed": 2**63 - 1, "num_return_sequences": 64}),
]


def test_whatever_a_client_sends_fails_alone(engine, reference):
    good = [submit(engine, LONG, seed=i, max_new_tokens=60, ignore_eos=True) for i in range(16)]
    bad = [submit(engine, prompt, **options) for prompt, options, _ in POISON]
    odd = [submit(engine, prompt, max_new_tokens=8, **options) for prompt, options in HARMLESS]
    for answer, (_, _, reason) in zip(bad, POISON, strict=True):
        with pytest.raises(InvalidRequestError, match=reason):
            answer.wait()
    for answer in odd:
        try:
            answer.wait()
        except InvalidRequestError as error:
            assert "finite" in str(error)
    for answer in good:
        assert len(answer.wait().token_ids()) == 60


def test_an_id_that_exists_is_refused(engine):
    first = submit(engine, "a", id="same", max_new_tokens=10**6, ignore_eos=True)
    with pytest.raises(InvalidRequestError, match="exists already"):
        submit(engine, "b", id="same").wait()
    first.wait()


def test_cancelling_frees_every_block(engine):
    streams = [submit(engine, LONG, stream=True, ignore_eos=True, max_new_tokens=150) for _ in range(200)]
    for stream in streams[:64]:
        assert stream.began.wait(PATIENCE)
    for stream in streams:
        engine.cancel(stream.id)
    counts = [len(stream.pieces) for stream in streams]
    drained(engine)
    assert [len(stream.pieces) for stream in streams] == counts
    assert not any(stream.error for stream in streams)


def test_the_queue_has_a_bound(folder):
    config = {**SMALL, "max_batch_size": 2, "queue_bound": 8}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        admitted, refused = [], 0
        for _ in range(100):
            try:
                admitted.append(submit(engine, "a", max_new_tokens=20, ignore_eos=True))
            except QueueFullError as error:
                assert "8 requests are waiting" in str(error)
                refused += 1
        assert refused
        for answer in admitted:
            assert len(answer.wait().token_ids()) == 20


def test_the_owner_gets_in_whatever_guests_have_in_hand(tmp_path):
    folder = str(tiny_model(tmp_path / "model", max_position_embeddings=2**14))
    config = {**SMALL, "max_batch_size": 2, "queue_bound": 8}
    guest = {"caller": (GUEST, "ipv4:192.0.2.1:5"), "max_new_tokens": 10**6, "ignore_eos": True}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        hogs = [submit(engine, "a", **guest) for _ in range(2)]
        eventually(lambda: engine.stats().running == 2)
        hogs += [submit(engine, "a", **guest) for _ in range(4)]
        with pytest.raises(QueueFullError, match="4 requests are waiting"):
            submit(engine, "a", **guest)
        assert len(submit(engine, "a", max_new_tokens=5, ignore_eos=True).wait().token_ids()) == 5
        assert not any(hog.done.is_set() for hog in hogs), "he has waited for none of them"


async def test_the_queue_has_a_bound_through_client_and_balancer(deploy, tmp_path):
    model = str(tiny_model(tmp_path / "model", max_position_embeddings=2**14))
    deployment = await deploy(model=model, replica_num=1, **{**SMALL, "max_batch_size": 2, "queue_bound": 8})
    client = deployment.client()
    running = [client.stream("a", max_new_tokens=2**13, ignore_eos=True) for _ in range(2)]
    for stream in running:
        await anext(stream)
    calls = [asyncio.create_task(client.generate("a", max_new_tokens=20, ignore_eos=True)) for _ in range(100)]
    # With both places of the batch taken, nobody leaves the queue.
    await until(lambda: sum(call.done() for call in calls) == 92)
    for stream in running:
        await stream.aclose()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFullError)]
    assert len(refused) == 92
    assert all("8 requests are waiting" in str(error) and error.retryable for error in refused)
    assert [answer.generated_length for (answer,) in (o for o in outcomes if isinstance(o, list))] == [20] * 8
    await until(deployment.is_idle)


@pytest.mark.parametrize("late", [False, True])
def test_a_cache_too_small_for_all_loses_nobody(folder, reference, monkeypatch, late):
    if late:
        know_tokens_late(monkeypatch)
    config = {**SMALL, "num_blocks": 12}
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as engine:
        options = {"do_sample": False, "max_new_tokens": 40, "ignore_eos": True}
        answers = [submit(engine, prompt, **options) for prompt in PROMPTS]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer.wait().token_ids() == reference.greedy(prompt, **options)[: len(answer.token_ids())]
        with pytest.raises(InvalidRequestError, match="is 96"):
            submit(engine, LONG * 4).wait()
        drained(engine)


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_are_not_finite_fail_the_request_and_not_the_engine(tmp_path, monkeypatch, late):
    if late:
        know_tokens_late(monkeypatch)
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][70] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with running(make(model_name_or_path=str(folder), inference_engine_config=SMALL)) as engine:
        text = tokenizer_of(folder).decode([70])
        with pytest.raises(InvalidRequestError, match="not finite"):
            submit(engine, text).wait()
        for _ in range(3):  # in the very block that held those numbers
            submit(engine, "A!", do_sample=False, max_new_tokens=1).wait()


def test_an_engine_that_was_never_busy_closes(folder):
    with running(make(model_name_or_path=folder, inference_engine_config=SMALL)) as engine:
        assert engine.stats().free_blocks == engine.stats().total_blocks


@pytest.mark.parametrize("of_guest", [False, True])
def test_neither_a_long_prompt_nor_a_guest_s_holds_others_up(engine, monkeypatch, of_guest):
    """They are tokenised beside the others, and as much text as waits is bounded."""
    begun, go_on = threading.Event(), threading.Event()
    copied = Tokenizer.copy

    def slow(tokenizer):
        begun.set()
        go_on.wait(PATIENCE)
        return copied(tokenizer)

    monkeypatch.setattr(Tokenizer, "copy", slow)
    monkeypatch.setattr(batching, "LONG_BYTES", 50)
    monkeypatch.setitem(engine._quotas._most_bytes, OWNER, ("owner_waiting_bytes", 100))
    engine._tokenizers.clear()
    if of_guest:
        guest = submit(engine, "x", caller=(GUEST, "b"), max_new_tokens=1)
        assert begun.wait(PATIENCE)
        begun.clear()
    long = submit(engine, "x" * 60, max_new_tokens=1)
    assert begun.wait(PATIENCE)
    assert submit(engine, "short", max_new_tokens=1).wait().token_ids()
    with pytest.raises(
        QueueFullError,
        match=r"^60 bytes of requests are waiting, 41 are to come, and owner_waiting_bytes=100 are allowed",
    ):
        submit(engine, "y" * 41, max_new_tokens=1)
    go_on.set()
    assert long.wait().token_ids()
    if of_guest:
        assert guest.wait().token_ids()
    assert submit(engine, "y" * 60, max_new_tokens=1).wait().token_ids()
