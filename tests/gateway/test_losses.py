"""What runs at a gateway goes on when what serves it is lost: OpenAI's clients see whole answers, and nothing twice."""

import asyncio

import pytest
from openai import AsyncOpenAI

from tests.waiting import until

WORDS = "to be or not that is the question"
TOKENS = 60
WHOLE = "".join(f"{WORDS.split()[number % 8]} " for number in range(TOKENS))
CHAT = "".join(f"{['user:', *WORDS.split()][number % 9]} " for number in range(TOKENS))


async def chat(api, pieces):
    """The text of a streamed chat, once its shape is right."""
    roles, ends, usage = [], [], None
    stream = await api.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": WORDS}],
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            ends += [choice.finish_reason] if choice.finish_reason else []
            pieces.append(choice.delta.content or "")
    assert (roles, ends) == (["assistant"], ["length"])
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, TOKENS)
    assert "".join(pieces) == CHAT


async def completions(api, pieces):
    """Two streamed answers to one prompt, with a log probability for each token."""
    texts, logprobs = ["", ""], [0, 0]
    stream = await api.completions.create(
        model="chat", prompt=WORDS, max_tokens=TOKENS, n=2, logprobs=1, stream=True, temperature=1
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += len(choice.logprobs.tokens) if choice.logprobs else 0
            pieces.append(choice.text)
    assert (texts, logprobs) == ([WHOLE, WHOLE], [TOKENS, TOKENS])


async def whole(api, pieces):
    """An answer that is no stream."""
    answer = await api.completions.create(model="chat", prompt=WORDS, max_tokens=TOKENS)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (WHOLE, "length")
    assert answer.usage.completion_tokens == TOKENS


@pytest.mark.parametrize("losses", [("replica",), ("balancer",), ("replica", "balancer")], ids="+".join)
async def test_six_clients_do_not_notice(start, held, losses):
    face = start(replica_num=2, echo_delay=0.002)
    deployment = face.threaded.deployment
    async with AsyncOpenAI(base_url=f"{face.url}/v1", api_key=face.token, max_retries=0) as api:
        pieces = [[] for _ in range(6)]
        asked = (chat, chat, completions, completions, whole, whole)
        running = [asyncio.create_task(ask(api, so_far)) for ask, so_far in zip(asked, pieces, strict=True)]
        await until(lambda: sum(load.running for load in deployment.stats()) == 6 and all(pieces[:4]))
        for lost in losses:
            await asyncio.to_thread(face.threaded.do, lose(deployment, lost))
        held.set()
        await asyncio.gather(*running)
        answer = await api.completions.create(model="chat", prompt="still there", max_tokens=2)
    assert answer.choices[0].text == "still there "
    with face.http() as http:
        assert http.get("/health").status_code == 200
    await until(lambda: [each.state for each in deployment.balancer.membership.replicas] == ["ready", "ready"])


async def lose(deployment, what):
    """Kill a replica's engine, or the balancer, and let another come."""
    if what == "replica":
        deployment.ranks[1].engine.die()
        await until(lambda: len(deployment.ranks[1].epochs) == 2)  # the order to start another
    else:
        await deployment.kill_balancer()
        await deployment.replace_balancer()
