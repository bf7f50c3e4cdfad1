"""The routes of the HTTP face: the OpenAI API over a client of the deployment."""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mii_hpc.errors import MIIError
from mii_hpc.gateway.http import Admits, Door, EventStream, error_response, unless_it_hangs_up
from mii_hpc.gateway.metrics import exposition
from mii_hpc.gateway.model import ServedModel
from mii_hpc.gateway.schema import (
    Arguments,
    ChatCompletion,
    Completion,
    Detokenize,
    Generation,
    Tokenize,
    error_body,
    parse,
    status_of,
)
from mii_hpc.rpc.remembered import Remembered

log = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0
"""How long the answer to /health is remembered: anybody may ask."""
RETRY_SECONDS = 1
DEEPSPEED_MII_SUFFIX = "-mii-deployment"
"""What DeepSpeed-MII adds to a model's name to make a deployment's."""
HUNG_UP = 499
"""The status that nobody sees: the client is gone."""


class Gateway:
    """The HTTP face of one deployment. Belongs to one event loop."""

    def __init__(self, model: ServedModel, admits: Admits) -> None:
        self._model, self._admits = model, admits
        self._is_ready = Remembered(model.is_ready, HEALTH_SECONDS)

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            Route("/mii/{name:path}", self._deepspeed_mii, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers: dict[Any, Any] = {
            MIIError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_failure,
        }
        return Starlette(routes=routes, middleware=[Middleware(Door, self._admits)], exception_handlers=handlers)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [await self._model.card()]})

    async def _one_model(self, request: Request) -> Response:
        self._model.check_name(request.path_params["model"])
        return JSONResponse(await self._model.card())

    async def _completions(self, request: Request) -> Response:
        return await self._generated(request, parse(Completion, await request.body()))

    async def _chat_completions(self, request: Request) -> Response:
        return await self._generated(request, parse(ChatCompletion, await request.body()))

    async def _deepspeed_mii(self, request: Request) -> Response:
        """Answer as DeepSpeed-MII's RESTful gateway does: the arguments of generate() in, a list of answers out."""
        self._model.check_name(request.path_params["name"].removesuffix(DEEPSPEED_MII_SUFFIX))
        asked = parse(Arguments, await request.body())
        answers = await unless_it_hangs_up(request.receive, self._model.client.generate(**asked.root))
        return JSONResponse([answer.to_msg_dict() for answer in answers])

    async def _tokenize(self, request: Request) -> Response:
        asked = parse(Tokenize, await request.body())
        self._model.check_name(asked.model)
        seen = await self._model.client.tokenize(asked.as_prompt(), plain=not asked.add_special_tokens)
        texts = [token.decode(errors="replace") for token in seen.tokens] if asked.return_token_strs else None
        return JSONResponse(
            {
                "count": len(seen.token_ids),
                "max_model_len": (await self._model.description()).max_length,
                "tokens": seen.token_ids,
                "token_strs": texts,
            }
        )

    async def _detokenize(self, request: Request) -> Response:
        asked = parse(Detokenize, await request.body())
        self._model.check_name(asked.model)
        return JSONResponse({"prompt": (await self._model.client.tokenize(asked.tokens)).text if asked.tokens else ""})

    async def _tokenizer_info(self, request: Request) -> Response:
        described = await self._model.description()
        return JSONResponse(
            {
                **described.tokenizer,
                "tokenizer_class": described.tokenizer.get("class"),
                "chat_template": described.chat_template,
            }
        )

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("", 200 if await self._is_ready.value() else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(exposition(await self._model.client.status()), media_type=CONTENT_TYPE_LATEST)

    async def _generated(self, request: Request, asked: Generation) -> Response:
        if not asked.stream:
            return JSONResponse(await unless_it_hangs_up(request.receive, self._model.answer(asked)))
        chunks = self._model.chunks(asked)
        try:
            # What is wrong with a request is known before its answer begins, and is told by the status.
            first = await unless_it_hangs_up(request.receive, anext(chunks))
        except BaseException:
            await chunks.aclose()
            raise
        return EventStream(first, chunks)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MIIError)
    status = status_of(error)
    if status >= 500:
        log.warning("%s %s: %s", request.method, request.url.path, error)
    headers = {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else None
    return JSONResponse(error_body(error, status), status, headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(error.detail, error.status_code, None)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=HUNG_UP)


async def _answer_failure(request: Request, error: Exception) -> Response:
    return error_response("the gateway has failed on this request; its log says why", 500, None)
