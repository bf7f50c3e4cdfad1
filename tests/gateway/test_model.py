import asyncio
from types import SimpleNamespace

from mii_hpc.gateway.model import ServedModel
from mii_hpc.gateway.schema import Completion
from mii_hpc.generation import GenerationFinishReason, Response, Tokenization

CALLERS = 20


class Client:
    """Answers each prompt with two tokens that no other answer has, and notes what it is asked the bytes of."""

    mii_config = SimpleNamespace(deployment_name="words")

    def __init__(self):
        self.asked = []
        self.answered = 0

    async def describe(self):
        return SimpleNamespace(defaults={}, max_length=100)

    async def generate(self, prompts, **_):
        self.answered += 1
        ids = (2 * self.answered, 2 * self.answered + 1)
        return [Response("ab", 1, 2, GenerationFinishReason.LENGTH, ids, (-1.0, -1.0)) for _ in prompts]

    async def tokenize(self, prompt):
        self.asked.append(set(prompt))
        await asyncio.sleep(0)
        if len(self.asked) == 1:
            raise ConnectionError
        return Tokenization(token_ids=tuple(prompt), tokens=tuple(b"%d" % one for one in prompt), text="")


def test_what_many_answers_tell_of_is_asked_for_in_few_calls():
    client = Client()
    model = ServedModel(client, home=None)
    asked = Completion(model="words", prompt="a", max_tokens=2, logprobs=0)

    async def all_at_once():
        return await asyncio.gather(*(model.answer(asked) for _ in range(CALLERS)), return_exceptions=True)

    async def twice():
        return await all_at_once(), await all_at_once()

    failed, answers = asyncio.run(twice())
    assert [type(answer) for answer in failed] == [ConnectionError] * CALLERS
    told = [answer["choices"][0]["logprobs"]["tokens"] for answer in answers]
    assert told == [[str(2 * number), str(2 * number + 1)] for number in range(CALLERS + 1, 2 * CALLERS + 1)]
    assert len(client.asked) == 2
