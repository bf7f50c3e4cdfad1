import json

import pytest

from mii_hpc.config import GenerateParamsConfig
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import Chat, GenerationRequest, Response, as_prompts


def test_a_response_is_the_plain_value_that_deepspeed_miis_is():
    response = Response("text", 3, 5, GenerationFinishReason.LENGTH)
    assert response == Response("text", 3, 5, GenerationFinishReason.LENGTH, token_ids=(1, 2), index=1, replica=1)
    assert response != Response("text", 3, 6, GenerationFinishReason.LENGTH)
    assert (str(response), f"{response!r}", response.finish_reason.value) == ("text", "text", "length")
    response.generated_text += "!"
    assert response.generated_text == "text!"


def test_a_response_travels_as_deepspeed_miis_message():
    response = Response("text", 3, 5, GenerationFinishReason.STOP, token_ids=(1, 2))
    message = json.loads(json.dumps(response.to_msg_dict()))
    assert message == {"generated_text": "text", "prompt_length": 3, "generated_length": 5, "finish_reason": "stop"}
    back = Response.from_msg_dict(message)
    assert back == response
    assert back.finish_reason is GenerationFinishReason.STOP


CHAT = Chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("prompts", "several"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        (("a",), ["a"]),
        ([], []),
        ([1, 2], [(1, 2)]),
        ([[1, 2], (3,), "a"], [(1, 2), (3,), "a"]),
        (CHAT, [CHAT]),
        ([CHAT, "a"], [CHAT, "a"]),
    ],
)
def test_prompts_are_texts_token_ids_or_conversations(prompts, several):
    assert as_prompts(prompts) == several


@pytest.mark.parametrize("messages", [[], ["a"], [{"content": "a"}], [{"role": 1}]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(InvalidRequestError, match="messages: "):
        Chat(messages)


def test_only_a_text_can_be_part_of_the_answer():
    with pytest.raises(InvalidRequestError, match="return_full_text=True: the prompt must be a text"):
        GenerationRequest("1", (1, 2), GenerateParamsConfig(return_full_text=True))


@pytest.mark.parametrize(
    "prompts", [{"query": ["a"]}, {"a", "b"}, 7, None, [True], [-1], [2**31], [[]], [1, "a"], b"a"]
)
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(InvalidRequestError, match="must be a string or a list of strings"):
        as_prompts(prompts)
