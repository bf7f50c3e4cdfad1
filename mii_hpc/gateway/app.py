"""The routes of the HTTP face: the OpenAI API over a client of the deployment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mii_hpc.clients.asynchronous import AsyncMIIClient
from mii_hpc.deployments.lookup import Home
from mii_hpc.deployments.registry import Entry
from mii_hpc.errors import MIIError
from mii_hpc.gateway.answers import ChatShape, CompletionShape, Shape, Usage
from mii_hpc.gateway.http import Admits, Door, EventStream, error_body, error_response, status_of, unless_it_hangs_up
from mii_hpc.gateway.schema import ChatCompletion, Completion, Detokenize, Generation, Tokenize, parse
from mii_hpc.generation import Prompt
from mii_hpc.generation import Response as Answer

log = logging.getLogger(__name__)

DESCRIPTION_SECONDS = 60.0
"""How long what is served is remembered."""
HEALTH_SECONDS = 1.0
"""How long the answer to /health is remembered: anybody may ask."""
RETRY_SECONDS = 1
HUNG_UP = 499
"""The status that nobody sees: the client is gone."""


class Gateway:
    """The HTTP face of one deployment. Belongs to one event loop."""

    def __init__(self, client: AsyncMIIClient, home: Home, admits: Admits) -> None:
        self._client, self._home, self._admits = client, home, admits
        self._name = client.mii_config.deployment_name
        self._description = _Remembered(client.describe, DESCRIPTION_SECONDS)
        self._is_ready = _Remembered(self._look_whether_ready, HEALTH_SECONDS)
        self._vocabulary: dict[int, bytes] = {}

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/health", self._health),
        ]
        handlers: dict[Any, Any] = {
            MIIError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_failure,
        }
        return Starlette(routes=routes, middleware=[Middleware(Door, self._admits)], exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [await self._model_card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(await self._model_card())

    async def _model_card(self) -> dict[str, Any]:
        entry = self._entry()
        return {
            "id": entry.deployment_name,
            "object": "model",
            "created": int(entry.started or entry.submitted),
            "owned_by": "mii_hpc",
            "root": entry.model,
            "max_model_len": (await self._description.value()).max_length,
        }

    async def _completions(self, request: Request) -> Response:
        asked = parse(Completion, await request.body())
        shape = CompletionShape("cmpl", "text_completion", asked.model)
        return await self._generated(request, asked, asked.prompts(), shape)

    async def _chat_completions(self, request: Request) -> Response:
        asked = parse(ChatCompletion, await request.body())
        shape = ChatShape("chatcmpl", "chat.completion", asked.model)
        return await self._generated(request, asked, asked.prompts(), shape)

    async def _tokenize(self, request: Request) -> Response:
        asked = parse(Tokenize, await request.body())
        self._check_model(asked.model)
        seen = await self._client.tokenize(asked.as_prompt(), plain=not asked.add_special_tokens)
        texts = [token.decode(errors="replace") for token in seen.tokens] if asked.return_token_strs else None
        return JSONResponse(
            {
                "count": len(seen.token_ids),
                "max_model_len": (await self._description.value()).max_length,
                "tokens": seen.token_ids,
                "token_strs": texts,
            }
        )

    async def _detokenize(self, request: Request) -> Response:
        asked = parse(Detokenize, await request.body())
        self._check_model(asked.model)
        return JSONResponse({"prompt": (await self._client.tokenize(asked.tokens)).text if asked.tokens else ""})

    async def _tokenizer_info(self, request: Request) -> Response:
        described = await self._description.value()
        return JSONResponse(
            {
                **described.tokenizer,
                "tokenizer_class": described.tokenizer.get("class"),
                "chat_template": described.chat_template,
            }
        )

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("", 200 if await self._is_ready.value() else 503)

    async def _look_whether_ready(self) -> bool:
        try:
            return any(replica.state == "ready" for replica in (await self._client.status()).replicas)
        except MIIError:
            return False

    async def _generated(self, request: Request, asked: Generation, prompts: list[Prompt], shape: Shape) -> Response:
        self._check_model(asked.model)
        options = asked.options((await self._description.value()).defaults)
        shape.before = await self._texts_before(asked, prompts)
        if not asked.stream:
            answers = await unless_it_hangs_up(request.receive, self._client.generate(prompts, **options))
            await self._learn(answers)
            return JSONResponse(shape.whole(answers, asked, self._vocabulary))
        pieces = self._events(asked, prompts, options, shape)
        try:
            # What is wrong with a request is known before its answer begins, and is told by the status.
            first = await unless_it_hangs_up(request.receive, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        return EventStream(first, pieces)

    async def _events(
        self, asked: Generation, prompts: list[Prompt], options: dict[str, Any], shape: Shape
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        usage = Usage()
        streams = [self._client.stream(prompt, **options) for prompt in prompts]
        async with aclosing(_merged(streams)) as merged:
            async for number, piece in merged:
                index = number * asked.n + piece.index
                usage.add(number, index, piece)
                await self._learn([piece])
                for chunk in shape.chunks(index, piece, asked, self._vocabulary):
                    yield chunk | ({"usage": None} if asked.wants_usage else {})
        if asked.wants_usage:
            yield shape.envelope([]) | {"usage": usage.totals()}

    async def _texts_before(self, asked: Generation, prompts: list[Prompt]) -> list[str]:
        """Return what each answer begins with: its prompt, where the request wants it back."""
        if not isinstance(asked, Completion) or not asked.echo:
            return [""] * (len(prompts) * asked.n)
        texts = [
            prompt if isinstance(prompt, str) else (await self._client.tokenize(prompt)).text for prompt in prompts
        ]
        return [text for text in texts for _ in range(asked.n)]

    async def _learn(self, answers: Sequence[Answer]) -> None:
        """Learn the bytes of the tokens that are told of."""
        unknown = {
            token_id for answer in answers if answer.logprobs for token_id in answer.token_ids
        } - self._vocabulary.keys()
        if unknown:
            seen = await self._client.tokenize(tuple(unknown))
            self._vocabulary.update(zip(seen.token_ids, seen.tokens, strict=True))

    def _check_model(self, name: str | None) -> None:
        """Raise HTTPException unless the deployment goes by that name."""
        if name is None or name == self._name:
            return
        entry = self._entry()
        if name not in (entry.deployment_name, entry.model):
            raise HTTPException(404, f"The model '{name}' does not exist; this is '{entry.deployment_name}'")

    def _entry(self) -> Entry:
        return self._home.get(self._name).entry


class _Remembered:
    """The result of a question that is not asked again at once; those who want it meanwhile wait for the same."""

    def __init__(self, ask: Callable[[], Awaitable[Any]], seconds: float) -> None:
        self._ask, self._seconds = ask, seconds
        self._asking = asyncio.Lock()
        self._until = float("-inf")
        self._result: Any = None

    async def value(self) -> Any:
        """Return the result. Raises what the question raises."""
        async with self._asking:
            if time.monotonic() > self._until:
                self._result = await self._ask()
                self._until = time.monotonic() + self._seconds
            return self._result


async def _merged(streams: Sequence[AsyncGenerator[Answer]]) -> AsyncGenerator[tuple[int, Answer]]:
    """Yield the pieces of all streams as they come, each with its stream's number. Closing it closes them."""
    arrived: asyncio.Queue[tuple[int, Answer | Exception | None]] = asyncio.Queue(maxsize=len(streams))

    async def pump(number: int, stream: AsyncGenerator[Answer]) -> None:
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


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MIIError)
    status = status_of(error)
    if status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    headers = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else None
    return JSONResponse(error_body(error, status), status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "model_not_found" if error.detail.startswith("The model ") else None
    return error_response(error.detail, error.status_code, code)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=HUNG_UP)


async def _answer_failure(request: Request, error: Exception) -> Response:
    return error_response("the gateway has failed on this request; its log says why", 500, None)
