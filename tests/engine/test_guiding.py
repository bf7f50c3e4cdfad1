"""Answers that are held to a grammar, beside others that are not."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("llguidance")

from transformers import AutoTokenizer

from mii_hpc.config import ModelConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.engine import guiding
from mii_hpc.engine.guiding import Guides
from mii_hpc.engine.tokenizer import Tokenizer
from mii_hpc.errors import InvalidRequestError
from tests.engine.collect import drained, make, running, submit
from tests.engine.late import know_tokens_late
from tests.models import VOCABULARY, replace_tokenizer_by_sentencepiece, save_tokenizer, tiny_model

pytestmark = pytest.mark.engine

PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["für", "🙂🚀", "Ann"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
OPTIONS = [
    {"do_sample": False},
    {"seed": 1, "temperature": 2.0, "top_p": 1.0},
    {"seed": 2, "temperature": 1.0, "top_p": 0.5, "top_k": 20},
    {
        "seed": 3,
        "repetition_penalty": 1.3,
        "frequency_penalty": 1.0,
        "logit_bias": {70: 5.0},
        "num_return_sequences": 3,
    },
]
PLAIN = {"seed": 9, "temperature": 1.5, "max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module", params=["at once", "late", "sentencepiece"])
def engine(request, tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("llama"))
    if request.param == "sentencepiece":
        replace_tokenizer_by_sentencepiece(folder)
        path = Path(folder) / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token_id": 1, "eos_token_id": 2}))
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "late":
            know_tokens_late(patch)
        config = {"max_batch_size": 16, "page_size": 8, "max_batch_tokens": 64}
        with running(make(model_name_or_path=str(folder), inference_engine_config=config)) as engine:
            yield engine
            drained(engine)


def check(answer, is_right):
    indices = {piece.index for piece in answer.wait().pieces}
    for index in indices:
        assert answer.finish_reason(index) is GenerationFinishReason.STOP, answer.text(index)
        assert is_right(answer.text(index)), answer.text(index)
    return len(indices)


def is_person(text):
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "tags", "ok"]
        and person["name"] in PERSON["properties"]["name"]["enum"]
        and 0 <= person["age"] <= 150
        and len(person["tags"]) <= 2
        and all(len(tag) <= 3 for tag in person["tags"])
        and isinstance(person["ok"], bool)
    )


def test_json_beside_answers_that_are_not_guided(engine):
    alone = submit(engine, "Tell me", **PLAIN).wait()
    plain = [submit(engine, "Tell me", **PLAIN) for _ in range(2)]
    guided = [submit(engine, "A person:", structured_outputs={"json": PERSON}, **options) for options in OPTIONS]
    plain.append(submit(engine, "Tell me", **PLAIN))
    assert sum(check(answer, is_person) for answer in guided) == 6
    for answer in plain:
        assert answer.wait().token_ids() == alone.token_ids()
    again = submit(engine, "A person:", structured_outputs=json.dumps({"json": json.dumps(PERSON)}), **OPTIONS[1])
    assert again.wait().token_ids() == guided[1].token_ids()


def test_a_model_that_likes_spaces_writes_json_all_the_same(engine):
    spaces = [number for number in range(len(engine.tokenizer)) if engine.tokenizer.decode([number]).isspace()]
    assert spaces
    wanted = {"json": {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [[2, 3]]}}}}
    wanted["json"] |= {"required": ["a", "b"], "additionalProperties": False}
    answer = submit(engine, "x", structured_outputs=wanted, do_sample=False, logit_bias=dict.fromkeys(spaces, 100))
    check(answer, '{"a": 1, "b": [2, 3]}'.__eq__)


@pytest.mark.parametrize(
    ("wanted", "is_right"),
    [
        ({"regex": r"[a-c]{3}-\d{2,4}"}, re.compile(r"[a-c]{3}-\d{2,4}").fullmatch),
        ({"regex": "🙂|für €5"}, {"🙂", "für €5"}.__contains__),
        ({"choice": ["yes", "no", ' "quoted"\n\\']}, {"yes", "no", ' "quoted"\n\\'}.__contains__),
        ({"grammar": 'start: "a" inner "b" | "c"\ninner: "c" | "a" "c" "b"'}, re.compile("c|acb|aacbb").fullmatch),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, re.compile("x[0-9]y").fullmatch),
        ({"json": {"type": "object", "maxProperties": 0}}, lambda text: json.loads(text) == {}),
        ({"json": {"enum": ["für", None, 3]}}, lambda text: json.loads(text) in ("für", None, 3)),
    ],
)
def test_every_kind(engine, wanted, is_right):
    for seed in range(6):
        check(submit(engine, "x", structured_outputs=wanted, seed=seed, temperature=2.0, top_p=1.0), is_right)
    check(submit(engine, "x", structured_outputs=wanted, do_sample=False), is_right)


def test_an_answer_ends_only_where_it_is_complete(engine):
    end = engine.tokenizer.eos_token_id
    letters = {"structured_outputs": {"regex": "[ab]{2,200}"}, "seed": 3, "temperature": 2.0, "logit_bias": {end: 100}}
    at_once = submit(engine, "x", **letters).wait()
    assert (at_once.text() in {"aa", "ab", "ba", "bb"}, at_once.token_ids()[-1]) == (True, end)
    late = submit(engine, "x", min_new_tokens=20, **letters).wait()
    assert (late.token_ids().index(end), late.finish_reason()) == (20, GenerationFinishReason.STOP)
    never = submit(engine, "x", ignore_eos=True, max_new_tokens=30, **letters).wait()
    assert (never.finish_reason(), end in never.token_ids()) == (GenerationFinishReason.LENGTH, False)
    assert set(never.text()) <= {"a", "b"}
    # What is complete and cannot go on ends, whatever else is asked for.
    for options in ({"min_new_tokens": 9}, {"ignore_eos": True}, {"stop_token_ids": [7]}):
        assert check(submit(engine, "x", structured_outputs={"choice": ["yes"]}, **options), "yes".__eq__)
    nothing = {"structured_outputs": {"regex": "(x{0})"}}
    assert check(submit(engine, "x", ignore_eos=True, **nothing), "".__eq__)


def test_a_stop_string_ends_it_anywhere(engine):
    answer = submit(engine, "x", structured_outputs={"choice": ["abcdef"]}, stop=["cd"]).wait()
    assert (answer.text(), answer.finish_reason()) == ("ab", GenerationFinishReason.STOP)
    whole = submit(engine, "x", structured_outputs={"choice": ["abcdef"]}, return_full_text=True).wait()
    assert whole.text() == "xabcdef"


def test_what_is_told_of_tokens_is_the_models_own(engine):
    answer = submit(engine, "x", structured_outputs={"choice": ["zzz"]}, logprobs=True, top_logprobs=3).wait()
    tops = [top for piece in answer.pieces for top in piece.top_logprobs]
    assert len(answer.logprobs()) == len(tops) == len(answer.token_ids())
    assert all(value < top[0][1] for value, top in zip(answer.logprobs(), tops, strict=True))


def test_a_cache_too_small_for_all(engine):
    folder = engine.tokenizer.name_or_path
    config = {"max_batch_size": 8, "num_blocks": 30, "page_size": 8, "max_batch_tokens": 32}
    options = {"temperature": 2.0, "structured_outputs": {"regex": "[a-z]{90}"}}
    expected = [submit(engine, "a b c", seed=seed, **options) for seed in range(6)]
    with running(make(model_name_or_path=folder, inference_engine_config=config)) as small:
        answers = [submit(small, "a b c", seed=seed, **options) for seed in range(6)]
        for answer, other in zip(answers, expected, strict=True):
            assert answer.wait().token_ids() == other.wait().token_ids()
        drained(small)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"json": {"type": "strin"}}, "Invalid type: strin"),
        ({"json": {"$ref": "http://localhost/x.json"}}, "does not fetch"),
        ({"json": {"uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"grammar": "root ::= nope"}, "Rule 'nope' not found"),
        ({"grammar": 'start: "a" nope'}, "unknown name"),
        # As good as for ever.
        (
            {"grammar": f"start: T\nT: {' & '.join(f'/.*a.*{c}.*/' for c in 'abcdefghijklmnopqrstuvwx')}"},
            "more than 3 s",
        ),
    ],
)
def test_what_is_no_grammar_is_refused(tmp_path, wanted, said):
    save_tokenizer(tmp_path)
    guides = Guides(Tokenizer(ModelConfig(tokenizer=AutoTokenizer.from_pretrained(tmp_path)), VOCABULARY, (1,)))
    with pytest.raises(InvalidRequestError, match=r"^structured_outputs: ") as refused:
        guides.make(json.dumps(wanted), {1}, 1)
    assert said in str(refused.value)


def test_what_becomes_too_complex_fails_alone(engine, monkeypatch):
    monkeypatch.setitem(guiding.LIMITS, "step_max_items", 5)
    alone = submit(engine, "Tell me", **PLAIN).wait()
    growing = submit(engine, "x", structured_outputs={"grammar": 'start: "ab" s\ns: s s | s s s | "a" | ""'})
    beside = submit(engine, "Tell me", **PLAIN)
    guided = submit(engine, "x", structured_outputs={"choice": ["abc"]})
    with pytest.raises(InvalidRequestError, match=r"^structured_outputs: .*Too many items"):
        growing.wait()
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        submit(engine, "x", structured_outputs={"regex": "("}).wait()
    assert beside.wait().token_ids() == alone.token_ids()
    assert guided.wait().text() == "abc"
