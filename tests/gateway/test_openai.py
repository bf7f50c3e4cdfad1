"""The official client against a gateway, a deployment and echo engines."""

import pytest
from openai import (
    APIStatusError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
)

from tests.waiting import until

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
ECHOED = "system: be brief user: hello there "


def test_models(api):
    (model,) = api.models.list()
    assert (model.id, model.object, model.root) == ("chat", "model", "echo")
    assert api.models.retrieve("chat") == api.models.retrieve("echo") == model


def test_a_completion(api):
    answer = api.completions.create(model="chat", prompt="to be or not", max_tokens=None)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("to be or not " * 4, "length", None)
    assert (answer.object, answer.model) == ("text_completion", "chat")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 16, 20)


def test_several_prompts_with_several_answers(api):
    answer = api.completions.create(model="chat", prompt=["a", "b"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "a a "),
        (1, "a a "),
        (2, "b b "),
        (3, "b b "),
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 8)


def test_prompts_as_token_ids(face, api):
    with face.http() as http:
        token_ids = http.post("/tokenize", json={"model": "chat", "prompt": "to be"}).json()["tokens"]
    one = api.completions.create(model="chat", prompt=token_ids, max_tokens=2)
    two = api.completions.create(model="chat", prompt=[token_ids, [*token_ids, 7]], max_tokens=3, echo=True)
    assert one.choices[0].text == "to be "
    assert [choice.text for choice in two.choices] == ["to be to be to ", "to be 7 to be 7 "]


def test_a_stop_string_and_a_minimum(api):
    answer = api.completions.create(model="chat", prompt="a b c d", stop=["x", "c"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a b ", "stop")
    answer = api.completions.create(model="chat", prompt="a b c d", stop="c", extra_body={"min_tokens": 4})
    assert answer.choices[0].text == "a b c d a b "


def test_a_stream_of_completions_ends_with_its_usage(api):
    chunks = list(
        api.completions.create(
            model="chat", prompt=["a b", "c"], max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        assert choice.index not in ends
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert (texts, ends) == ({0: "a b a ", 1: "c c c "}, {0: "length", 1: "length"})
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 6)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(api):
    answer = api.chat.completions.create(model="chat", messages=MESSAGES)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ECHOED, "stop")
    assert answer.object == "chat.completion"
    assert answer.usage.total_tokens == 12


def test_a_chat_of_text_parts(api):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    answer = api.chat.completions.create(model="chat", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "user: hello there "


def test_a_stream_of_chat_says_assistant_once(api):
    chunks = list(api.chat.completions.create(model="chat", messages=MESSAGES, n=2, stream=True))
    for index in (0, 1):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert "".join(choice.delta.content or "" for choice in choices) == ECHOED
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


def test_max_completion_tokens_and_a_seed(api):
    answer = api.chat.completions.create(model="chat", messages=MESSAGES, max_completion_tokens=2, seed=-1)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("system: be ", "length")


def test_logprobs(api):
    completion = api.completions.create(model="chat", prompt="to be", max_tokens=2, logprobs=0, echo=False)
    told = completion.choices[0].logprobs
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["to ", "be "], [0.0, 0.0], [0, 3])
    chat = api.chat.completions.create(model="chat", messages=MESSAGES, logprobs=True, max_tokens=1)
    (token,) = chat.choices[0].logprobs.content
    assert (token.token, token.logprob, bytes(token.bytes), token.top_logprobs) == ("system: ", 0.0, b"system: ", [])
    stream = api.completions.create(model="chat", prompt="to be", max_tokens=3, logprobs=0, stream=True)
    told = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
    assert [offset for each in told for offset in each.text_offset] == [0, 3, 6]


def test_a_prompts_own_logprobs(api):
    """As lm-evaluation-harness asks for them."""
    for stream in (False, True):
        options = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "stream": stream}
        answer = api.completions.create(model="chat", prompt=["to be or ", "a b "], **options)
        choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
        first, second = sorted(choices, key=lambda choice: choice.index)
        assert (first.text, second.text) == ("to be or to ", "a b a ")
        assert first.logprobs.tokens == ["to ", "be ", "or ", "to "]
        assert first.logprobs.token_logprobs == [None, 0.0, 0.0, 0.0]
        assert first.logprobs.top_logprobs == [None, {"be ": 0.0}, {"or ": 0.0}, {"to ": 0.0}]
        assert first.logprobs.text_offset == [0, 3, 6, 9]
        assert second.logprobs.tokens == ["a ", "b ", "a "]


def test_the_prompt_alone(api):
    answer = api.completions.create(model="chat", prompt="to be ", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs.tokens) == ("to be ", "length", ["to ", "be "])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)
    with pytest.raises(BadRequestError, match="nothing to return without echo"):
        api.completions.create(model="chat", prompt="to be", max_tokens=0)


def test_penalties_and_biases_are_taken(api):
    options = {"frequency_penalty": 1.5, "presence_penalty": -2, "logit_bias": {"5": -100}}
    assert api.completions.create(model="chat", prompt="a", max_tokens=1, **options).choices[0].text == "a "
    chat = api.chat.completions.create(model="chat", messages=MESSAGES, logprobs=True, top_logprobs=2, **options)
    (token, *_) = chat.choices[0].logprobs.content
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("system: ", 0.0)]


def test_a_wrong_key(face):
    with pytest.raises(AuthenticationError) as refused:
        face.openai(api_key="wrong").models.list()
    assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("name", ["gpt-4o", "cha"])
def test_a_model_that_is_not_there(api, name):
    for ask in (
        lambda: api.completions.create(model=name, prompt="a"),
        lambda: api.chat.completions.create(model=name, messages=MESSAGES),
        lambda: api.models.retrieve(name),
    ):
        with pytest.raises(NotFoundError) as refused:
            ask()
        assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 2, "temperature": 0}, "n", "needs a temperature above 0"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools are not called"),
        ({"response_format": "json"}, "response_format", "must be {'type': 'text'}, {'type': 'json_object'}"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format",
            "'json_schema': {'name': ..., 'schema': ...}",
        ),
        ({"response_format": JSON_SCHEMA, "guided_regex": "a"}, "response_format", "guided_regex: give one of them"),
        ({"guided_choice": [1]}, None, "choice must be a list of one or more strings"),
        ({"guided_regex": "a" * 2**16}, None, "and 65536 are allowed"),
        ({"structured_outputs": {"xml": "a"}}, None, "unknown field 'xml': valid are choice, grammar, json"),
        ({"response_format": {"type": "json_object"}}, None, "the echo engine repeats its prompt"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "valid integer"),
        ({"messages": []}, None, "at least one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
        ({"stop": ["x" * 2000]}, None, "1 to 1024 characters"),
        ({"min_tokens": 5, "max_tokens": 4}, None, "exceeds max_new_tokens"),
    ],
)
def test_bad_requests(api, body, param, said):
    with pytest.raises(BadRequestError) as refused:
        api.post("/chat/completions", cast_to=object, body={"model": "chat", "messages": MESSAGES, **body})
    assert refused.value.body["type"] == "invalid_request_error"
    assert refused.value.param == param
    assert said in refused.value.body["message"]


def test_unknown_fields_and_those_that_ask_for_nothing_are_ignored(api):
    ignored = {"user": "me", "store": True, "tools": [], "response_format": {"type": "text"}, "guided_choice": []}
    body = {"model": "chat", "messages": MESSAGES, "frequency_penalty": 0.0, **ignored}
    assert api.post("/chat/completions", cast_to=object, body=body)["choices"][0]["message"]["content"] == ECHOED


def test_a_bad_request_is_one_in_a_stream_too(api):
    with pytest.raises(BadRequestError, match="the prompt is empty"):
        api.completions.create(model="chat", prompt=" ", stream=True)


async def test_a_full_queue_is_429_and_is_tried_again(start):
    import asyncio

    face = start(queue_bound=1, max_batch_size=1, echo_delay=0.02)
    engine = face.threaded.deployment
    async with AsyncOpenAI(base_url=f"{face.url}/v1", api_key=face.token, max_retries=20) as api:
        running = asyncio.create_task(api.completions.create(model="chat", prompt="a", max_tokens=10**6))
        await until(lambda: engine.stats()[0].running == 1)
        waiting = asyncio.create_task(api.completions.create(model="chat", prompt="a", max_tokens=1))
        await until(lambda: engine.stats()[0].waiting == 1)
        with pytest.raises(RateLimitError) as refused:
            await api.with_options(max_retries=0).completions.create(model="chat", prompt="a")
        assert refused.value.response.headers["retry-after"] == "1"
        patient = asyncio.create_task(api.completions.create(model="chat", prompt="b", max_tokens=1))
        running.cancel()
        assert (await waiting).choices[0].text == "a "
        assert (await patient).choices[0].text == "b "


def test_a_deployment_that_is_gone_is_503(face, api):
    api.completions.create(model="chat", prompt="a")
    face.threaded.do(face.threaded.deployment.stop())
    with pytest.raises(InternalServerError) as refused:
        api.completions.create(model="chat", prompt="a")
    assert refused.value.status_code == 503


def test_a_lost_replica_ends_a_stream_with_an_error(start):
    face = start(echo_delay=0.02, migration_limit=0)
    with face.openai() as api:
        stream = api.completions.create(model="chat", prompt="a", max_tokens=10**6, stream=True)
        next(stream)
        engine = face.threaded.deployment.ranks[0].engine
        face.threaded.do(_die(engine))
        with pytest.raises(Exception, match="replica 0") as ended:
            list(stream)
    assert not isinstance(ended.value, APIStatusError)


async def _die(engine):
    engine.die("killed", 1)
