import random
from dataclasses import asdict, replace

import pytest

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import GenerateParamsConfig
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import (
    Chat,
    Description,
    GenerationFinishReason,
    GenerationRequest,
    Response,
    ResumedAnswer,
    joined,
)
from mii_hpc.rpc import wire

ALL_SET = GenerateParamsConfig(
    max_length=100,
    max_new_tokens=50,
    min_new_tokens=3,
    do_sample=True,
    temperature=0.7,
    top_p=0.25,
    top_k=40,
    repetition_penalty=1.1,
    seed=2**63 - 1,
    stop=("END", "\n\n", "é"),
    ignore_eos=True,
    return_full_text=True,
    num_return_sequences=2,
    logprobs=True,
    top_logprobs=20,
    prompt_logprobs=True,
    frequency_penalty=-1.5,
    presence_penalty=0.25,
    logit_bias={0: -100.0, 2**31 - 1: 0.5},
    stream=True,
    stop_token_ids=(3, 5),
    add_special_tokens=False,
    skip_special_tokens=False,
    structured_outputs={"choice": ["é", "🙂"]},
)


def travelled(request):
    return wire.unpack_request(wire.parse_request(wire.pack_request(request).SerializeToString()))


def test_a_request_with_every_option():
    assert set(GenerateParamsConfig.model_fields) == ALL_SET.model_fields_set
    request = GenerationRequest("id", "a prompt 🙂\x00\n", ALL_SET)
    assert travelled(request) == request
    greedy = GenerationRequest("id", "", GenerateParamsConfig(do_sample=False, seed=0))
    assert travelled(greedy) == greedy


@pytest.mark.parametrize(
    "prompt", ["", "text", (1, 2**31 - 1), Chat([{"role": "user", "content": "é"}], continues=True, arguments={"a": 1})]
)
def test_prompts_travel(prompt):
    assert travelled(GenerationRequest("id", prompt, GenerateParamsConfig())).prompt == prompt
    for plain in (True, False):
        assert wire.unpack_tokenize(wire.pack_tokenize(prompt, plain).SerializeToString()) == (prompt, plain)


def test_a_conversation_is_json():
    with pytest.raises(InvalidRequestError, match="messages: not to be written as JSON"):
        wire.pack_tokenize(Chat([{"role": "user", "content": b"x"}]), False)
    with pytest.raises(InvalidRequestError, match="not a Chat"):
        wire.unpack_tokenize(pb.TokenizeRequest(chat='{"messages": 1}').SerializeToString())
    with pytest.raises(InvalidRequestError, match="not a Chat: recursion limit"):
        wire.unpack_tokenize(pb.TokenizeRequest(chat="[" * 100_000).SerializeToString())
    with pytest.raises(InvalidRequestError, match="not a valid TokenizeRequest"):
        wire.unpack_tokenize(b"\xff")


def test_what_is_served_travels():
    description = Description(10, {"top_k": 3}, "{{ messages }}", {"class": "x"})
    assert wire.unpack_description(wire.pack_description(description)) == description


def test_defaults_do_not_travel():
    message = wire.pack_request(GenerationRequest("id", "prompt", GenerateParamsConfig(top_p=0.9, stream=False)))
    assert message.params.ByteSize() == 0
    assert travelled(GenerationRequest("", "", GenerateParamsConfig())).params == GenerateParamsConfig()


def test_the_protocol_has_the_options_of_the_configuration():
    fields = pb.GenerateParams.DESCRIPTOR.fields
    assert [field.name for field in fields] == list(GenerateParamsConfig.model_fields)
    assert all(field.is_repeated or field.has_presence for field in fields)


@pytest.mark.parametrize("payload", [b"\xff", b"garbage", b"\x12\x05ab", b"\x12\x01\xff"])
def test_what_is_no_request_is_refused(payload):
    with pytest.raises(InvalidRequestError, match=r"not a valid GenerateRequest message"):
        wire.parse_request(payload)


def test_options_out_of_range_are_refused_at_the_receiver_too():
    message = pb.GenerateRequest(id="1", prompt="x", params=pb.GenerateParams(top_p=7, max_new_tokens=-1))
    with pytest.raises(InvalidRequestError, match=r"max_new_tokens=-1: .*; top_p=7.0: "):
        wire.unpack_request(message)


def test_lone_surrogates_are_refused_before_they_travel():
    with pytest.raises(InvalidRequestError, match=r"^prompt: not valid Unicode at character 3"):
        wire.pack_request(GenerationRequest("id", "bad\ud800", GenerateParamsConfig()))
    with pytest.raises(InvalidRequestError, match=r"^stop"):
        wire.pack_request(GenerationRequest("id", "good", GenerateParamsConfig(stop=("bad\ud800",))))


@pytest.mark.parametrize(
    "piece",
    [
        Response(""),
        Response("text", 7, 9, GenerationFinishReason.LENGTH, (1, 2), (-0.5, -1.5), 3),
        Response("", 5, 5, GenerationFinishReason.STOP),
        Response(
            "",
            token_ids=(1,),
            logprobs=(-0.5,),
            top_logprobs=(((1, -0.5), (2, -0.75)),),
            prompt_logprobs=(-2.0, -3.0),
            prompt_top_logprobs=(((7, -0.25),), ()),
        ),
    ],
)
def test_pieces_travel(piece):
    assert asdict(wire.unpack_response(wire.pack_response(piece))) == asdict(piece)


def test_pieces_behind_each_other_are_their_join():
    """What the relay counts on where it knows nothing of a piece but its bytes."""
    pieces = [
        Response("Für ", 3, 1, token_ids=(1,), logprobs=(-0.5,), index=1, prompt_logprobs=(-2.0, -3.0)),
        Response("", 3, 2, token_ids=(2,), logprobs=(-1.5,), index=1),
        Response("5 €", 3, 3, GenerationFinishReason.STOP, (3,), (-2.5,), 1),
    ]
    chunks = [wire.pack_response(piece) for piece in pieces]
    both = wire.unpack_response(b"".join(chunks) + wire.pack_server(7, 2))
    (expected,) = joined(pieces)
    assert asdict(both) == asdict(replace(expected, replica=7, migrations=2))


@pytest.mark.parametrize("text", ["", "a", "a/1", "a/1/2/3", "a/-1/2", "a/x/2", "a/2/2", "a/²/3", "a" * 97 + "/1/2"])
def test_what_names_no_position_counts_like_any_request(text):
    assert wire.BatchPosition.parse(text) is None
    assert wire.BatchPosition.parse(str(wire.BatchPosition("a", 1, 2))) == wire.BatchPosition("a", 1, 2)


def test_methods_are_those_of_the_protocol():
    services = pb.DESCRIPTOR.services_by_name.values()
    assert set(wire.Method) == {f"/{s.full_name}/{method.name}" for s in services for method in s.methods}


@pytest.mark.parametrize(
    "given", [{"stop": ["x"] * 5000}, {"stop_token_ids": [1] * 5000}, {"logit_bias": dict.fromkeys(range(5000), 1.0)}]
)
def test_of_a_list_that_is_too_long_only_the_beginning_is_looked_at(given, monkeypatch):
    looked_at = []
    monkeypatch.setattr(wire, "validate", lambda _kind, options: looked_at.extend(options.values()))
    wire.unpack_params(pb.GenerateRequest(params=pb.GenerateParams(**given)))
    assert [len(value) for value in looked_at] == [wire.MAX_LISTED]
    monkeypatch.undo()
    with pytest.raises(InvalidRequestError, match="should have at most"):
        wire.unpack_params(pb.GenerateRequest(params=pb.GenerateParams(**given)))


def test_the_fields_of_a_message_are_seen_without_parsing():
    message = wire.pack_request(GenerationRequest("id", "a prompt", ALL_SET, (ResumedAnswer((1, 2), 3),) * 2))
    payload = message.SerializeToString()
    fields = [(number, payload[begin:end]) for number, begin, end in wire.fields_of(payload)]
    named = {
        field.name: [value for number, value in fields if number == field.number] for field, _ in message.ListFields()
    }
    assert {name: values for name, values in named.items() if name in ("id", "prompt")} == {
        "id": [b"id"],
        "prompt": [b"a prompt"],
    }
    assert named["params"] == [message.params.SerializeToString()]
    assert named["resume"] == [answer.SerializeToString() for answer in message.resume]
    assert sum(map(len, named.values())) == len(fields)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_no_message_has_fields_that_end(seed):
    chance = random.Random(seed)
    payload = chance.randbytes(chance.randrange(300))
    assert len(list(wire.fields_of(payload))) <= len(payload)


EMPTY = {"stop": b"\x52\0", "resume": b"\xa2\1\0", "unknown": b"\xf8\x3f\1"}


@pytest.mark.parametrize("field", EMPTY)
def test_a_request_of_too_many_fields_is_refused_unparsed(field, monkeypatch):
    """Millions of empty ones would take gigabytes."""
    payload = EMPTY[field] * 2**20
    if field == "stop":
        options = pb.GenerateRequest(params=pb.GenerateParams(stop=[""] * 2**20))
        payload = options.SerializeToString()
    with monkeypatch.context() as patch:
        patch.setattr(wire, "pb", None)
        with pytest.raises(InvalidRequestError, match=r"^the request has more than 512 fields$"):
            wire.parse_request(payload)


def test_token_ids_are_bounded(monkeypatch):
    monkeypatch.setattr(wire, "MAX_IDS", 3)
    resume = [pb.ResumedAnswer(token_ids=[1, 2])] * 2
    for message in (pb.GenerateRequest(prompt_ids=[1] * 4), pb.GenerateRequest(resume=resume)):
        with pytest.raises(InvalidRequestError, match=r"^prompt: the request has 4 token ids; 3 are allowed$"):
            wire.parse_request(message.SerializeToString())
    with pytest.raises(InvalidRequestError, match="4 token ids"):
        wire.unpack_tokenize(pb.TokenizeRequest(token_ids=[1] * 4).SerializeToString())


def test_a_conversation_of_too_many_values_is_refused_unread(monkeypatch):
    monkeypatch.setattr(wire, "from_json", None)
    chat = '{"messages": [' + "[]," * 2**20
    with pytest.raises(InvalidRequestError, match=r"^messages: the conversation has \d+ commas, colons and opening"):
        wire.unpack_request(pb.GenerateRequest(chat=chat))
