"""A gateway before a real engine, compared with transformers."""

import json
import re
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.engine.reference import Reference
from tests.gateway.test_metrics import values
from tests.models import CONTEXT, tiny_model

pytestmark = pytest.mark.engine

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def reference(llama):
    return Reference(llama)


@pytest.fixture
def face(start, llama):
    return start(model=str(llama), chat_template=TEMPLATE)


def test_it_answers_as_transformers_does(face, api, reference):
    def greedy(prompt, count, **options):
        return reference.decode(reference.greedy(prompt, max_new_tokens=count, **options))

    with face.http() as http:
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == CONTEXT
        expected = greedy("The quick brown fox", 16)
        answer = api.completions.create(model="chat", prompt="The quick brown fox", temperature=0)
        assert answer.choices[0].text == expected
        token_ids = http.post("/tokenize", json={"prompt": "The quick brown fox"}).json()["tokens"]
        stream = api.completions.create(model="chat", prompt=token_ids, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        told = api.completions.create(model="chat", prompt=token_ids, temperature=0, logprobs=0, max_tokens=8)
        logprobs = told.choices[0].logprobs
        assert "".join(logprobs.tokens) == told.choices[0].text
        ids = reference.greedy("The quick brown fox", max_new_tokens=8)
        assert logprobs.token_logprobs == pytest.approx(reference.logprobs("The quick brown fox", ids), abs=1e-3)

        told = (
            api.completions.create(model="chat", prompt=token_ids, temperature=0, logprobs=2, max_tokens=1, echo=True)
            .choices[0]
            .logprobs
        )
        assert "".join(told.tokens[:-1]) == "The quick brown fox"
        own = reference.logprobs("The", token_ids[1:])
        assert told.token_logprobs[1:-1] == pytest.approx(own, abs=1e-3)
        for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            assert value in top.values()  # the same float
            assert 2 <= len(top) <= 3
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())

        rendered = "<s>[user] Hello there\n[assistant]"
        seen = http.post("/tokenize", json={"messages": MESSAGES, "return_token_strs": True}).json()
        assert ("".join(seen["token_strs"]), seen["token_strs"].count("<s>")) == (rendered, 1)
        chat = api.chat.completions.create(model="chat", messages=MESSAGES, temperature=0, max_tokens=8)
        same = api.completions.create(model="chat", prompt=seen["tokens"], temperature=0, max_tokens=8)
        assert chat.choices[0].message.content == same.choices[0].text
        assert chat.usage.prompt_tokens == seen["count"]

        before = values(http.get("/metrics").text)
        for count in (3, 5):
            api.completions.create(model="chat", prompt=token_ids, temperature=0, max_tokens=count)
        after = values(http.get("/metrics").text)
        labels = (("engine", "0"), ("model_name", "chat"))
        for name, grown in (
            ("vllm:prompt_tokens_total", 2 * len(token_ids)),
            ("vllm:generation_tokens_total", 3 + 5),
            ("vllm:prefix_cache_queries_total", 2 * (len(token_ids) - 1)),
            ("vllm:request_queue_time_seconds_count", 2),
            ("vllm:e2e_request_latency_seconds_count", 2),
        ):
            assert after[name, *labels] - before[name, *labels] == grown, name

        seeded = [
            api.completions.create(model="chat", prompt="x", seed=seed, n=2, max_tokens=8).choices for seed in (1, 1, 2)
        ]
        texts = [[choice.text for choice in choices] for choices in seeded]
        assert texts[0] == texts[1] != texts[2]


class Person(BaseModel):
    name: Literal["für", "🙂🚀", "Ann"]
    age: int = Field(ge=0, le=150)
    friends: list[Literal["Bo", "Cy"]] = Field(max_length=2)


def test_answers_are_held_to_a_schema(face, api):
    pytest.importorskip("llguidance")
    asked = {"model": "chat", "messages": MESSAGES, "temperature": 1.5, "max_tokens": 200}
    parsed = api.chat.completions.parse(response_format=Person, n=3, seed=1, **asked)
    assert all(isinstance(choice.message.parsed, Person) for choice in parsed.choices)
    assert {choice.finish_reason for choice in parsed.choices} == {"stop"}
    with api.chat.completions.stream(response_format=Person, seed=1, **asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    one = api.chat.completions.create(response_format=wanted, **asked).choices[0].message.content
    assert json.loads(one) == {"a": 1}
    begun = api.chat.completions.create(response_format={"type": "json_object"}, **asked).choices[0].message.content
    assert begun[0] == "{"
    for extra, right in (
        ({"guided_json": json.dumps(schema)}, lambda text: json.loads(text) == {"a": 1}),
        ({"guided_regex": "[ab]{3}"}, re.compile("[ab]{3}").fullmatch),
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
        ({"guided_grammar": 'start: "x" | "y" "x"'}, re.compile("y?x").fullmatch),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}.__contains__),
    ):
        answer = api.completions.create(model="chat", prompt="a", max_tokens=200, extra_body=extra)
        assert right(answer.choices[0].text), extra
    for bad in ({"type": "strin"}, {"uniqueItems": True}):
        wanted = {"type": "json_schema", "json_schema": {"name": "bad", "schema": bad}}
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="structured_outputs: "):
                api.chat.completions.create(response_format=wanted, stream=stream, **asked)
