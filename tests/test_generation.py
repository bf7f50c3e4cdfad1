import json

import pytest

from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError
from mii_hpc.generation import Response, as_prompts


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


@pytest.mark.parametrize(("prompts", "texts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([], [])])
def test_prompts_are_a_string_or_strings(prompts, texts):
    assert as_prompts(prompts) == texts


@pytest.mark.parametrize("prompts", [{"query": ["a"]}, {"a", "b"}, 7, None, [1], b"a"])
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(InvalidRequestError, match="must be a string or a list of strings"):
        as_prompts(prompts)
