"""A deployment as OpenAI's clients see it: a model that completes prompts and conversations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.deployments.lookup import Home
from mii_hpc.deployments.registry import Entry
from mii_hpc.errors import MIIError
from mii_hpc.gateway.answers import ChatShape, CompletionShape, Shape, Usage, what_is_told
from mii_hpc.gateway.schema import Completion, Generation, RefusedError
from mii_hpc.generation import Description, Prompt, Response
from mii_hpc.rpc.remembered import Remembered

DESCRIPTION_SECONDS = 60.0
"""How long what is served is remembered."""


class ServedModel:
    """The model of a deployment, wherever it runs. Belongs to one event loop.

    Attributes:
        client: the client of the deployment.
        name: the deployment's name, which is the model's name here.
    """

    def __init__(self, client: AsyncMIIClient, home: Home) -> None:
        self.client = client
        self.name = client.mii_config.deployment_name
        self._home = home
        self._description: Remembered[Description] = Remembered(client.describe, DESCRIPTION_SECONDS)
        self._vocabulary: dict[int, bytes] = {}
        self._unknown: set[int] = set()
        self._asking: asyncio.Task[None] | None = None

    async def card(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        entry = self._entry()
        return {
            "id": entry.deployment_name,
            "object": "model",
            "created": int(entry.started or entry.submitted),
            "owned_by": "mii_hpc",
            "root": entry.model,
            "max_model_len": (await self.description()).max_length,
        }

    async def description(self) -> Description:
        """Return what is served."""
        return await self._description.value()

    async def is_ready(self) -> bool:
        """Whether at least one replica can answer."""
        try:
            return any(replica.state == "ready" for replica in (await self.client.status()).replicas)
        except MIIError:
            return False

    def check_name(self, name: str | None) -> None:
        """Raise RefusedError unless the model goes by that name: the deployment's, or the one it was served by."""
        if name is None or name == self.name:
            return
        entry = self._entry()
        if name not in (entry.deployment_name, entry.model):
            raise RefusedError(
                f"The model '{name}' does not exist; this is '{entry.deployment_name}'", "model", 404, "model_not_found"
            )

    async def answer(self, asked: Generation) -> dict[str, Any]:
        """Return the answers to a request, as one object. Raises MIIError."""
        prompts, options, shape = await self._prepared(asked)
        answers = [what_is_told(asked, answer) for answer in await self.client.generate(prompts, **options)]
        await self._learn(answers)
        return shape.whole(answers, asked)

    async def chunks(self, asked: Generation) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of the answers as they are made. Raises MIIError; closing it cancels the request."""
        prompts, options, shape = await self._prepared(asked)
        usage = Usage()
        streams = [self.client.stream(prompt, **options) for prompt in prompts]
        async with aclosing(_merged(streams)) as merged:
            async for number, piece in merged:
                index = number * asked.n + piece.index
                told = what_is_told(asked, piece)
                usage.add(number, index, told)
                await self._learn([told])
                for chunk in shape.chunks(index, told):
                    yield chunk | ({"usage": None} if asked.wants_usage else {})
        if asked.wants_usage:
            yield shape.envelope([]) | {"usage": usage.totals()}

    async def _prepared(self, asked: Generation) -> tuple[list[Prompt], dict[str, Any], Shape]:
        self.check_name(asked.model)
        prompts = asked.prompts()
        options = asked.options((await self.description()).defaults)
        shape = (CompletionShape if isinstance(asked, Completion) else ChatShape)(asked.model, self._vocabulary)
        if asked.begins_with_prompt:
            seen = [await self.client.tokenize(prompt) for prompt in prompts]
            # As it was given, without the special tokens that the model sees.
            seen = [replace(s, text=p) if isinstance(p, str) else s for s, p in zip(seen, prompts, strict=True)]
            if options["prompt_logprobs"]:
                for each in seen:
                    self._vocabulary.update(zip(each.token_ids, each.tokens, strict=True))
            shape.prompts = [each for each in seen for _ in range(asked.n)]
        return prompts, options, shape

    async def _learn(self, answers: Sequence[Response]) -> None:
        """Learn the bytes of the tokens that are told of; of all that are wanted meanwhile in one call."""
        told_of = {token_id for answer in answers if answer.logprobs for token_id in answer.token_ids}
        for answer in answers:
            for top in (*answer.top_logprobs, *answer.prompt_top_logprobs):
                told_of.update(token_id for token_id, _ in top)
        # A call that is under way was begun without these.
        for _ in range(2):
            unknown = told_of - self._vocabulary.keys()
            if not unknown:
                return
            self._unknown |= unknown
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask())
            await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        unknown, self._unknown = tuple(self._unknown), set()
        try:
            seen = await self.client.tokenize(unknown)
            self._vocabulary.update(zip(seen.token_ids, seen.tokens, strict=True))
        finally:
            self._asking = None

    def _entry(self) -> Entry:
        return self._home.get(self.name).entry


async def _merged(streams: Sequence[AsyncGenerator[Response]]) -> AsyncGenerator[tuple[int, Response]]:
    """Yield the pieces of all streams as they come, each with its stream's number. Closing it closes them."""
    arrived: asyncio.Queue[tuple[int, Response | Exception | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(number: int, stream: AsyncGenerator[Response]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await arrived.put((number, piece))
        except MIIError as error:
            await arrived.put((number, error))
        else:
            await arrived.put((number, None))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        unfinished = len(tasks)
        while unfinished:
            number, item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                unfinished -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
