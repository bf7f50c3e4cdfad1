"""The one boundary between our types and gRPC's: dataclasses and protobuf, errors and status codes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from mii_hpc import errors
from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import GenerateParamsConfig, validate
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError, MIIError
from mii_hpc.generation import GenerationRequest, Load, Response

ERROR_KEY = "mii-error"
"""Trailing metadata: the name of the error class."""
PLACE_KEY = "mii-place"
"""Metadata of a request: its place among the prompts of one call, as Place writes it."""
REPLICA_KEY = "mii-replica"
"""Initial metadata: the index of the replica that serves the request."""

_CODES: dict[type[MIIError], grpc.StatusCode] = {
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ReplicaLostError: grpc.StatusCode.ABORTED,
    errors.DeploymentStoppingError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    errors.RequestTimeoutError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RequestCancelledError: grpc.StatusCode.CANCELLED,
    errors.RequestError: grpc.StatusCode.INTERNAL,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a prompt in a list. gRPC may deliver two calls in another order than they were made."""

    call: str
    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.call}/{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Place | None:
        """Return the place that a text names, or None when it names none."""
        call, *numbers = text.split("/")
        if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
            return None
        place = cls(call, int(numbers[0]), int(numbers[1]))
        return place if place.index < place.count else None


class Method(NamedTuple):
    """One RPC of proto/mii_hpc.proto."""

    service: str
    name: str
    request: Any
    response: Any

    @property
    def path(self) -> str:
        """The path that gRPC calls it by."""
        return f"/{self.service}/{self.name}"


GENERATE = Method("mii_hpc.v1.Inference", "Generate", pb.GenerateRequest, pb.GenerateChunk)
LOAD = Method("mii_hpc.v1.Inference", "Load", pb.LoadRequest, pb.LoadResponse)
STATUS = Method("mii_hpc.v1.Deployment", "Status", pb.StatusRequest, pb.StatusResponse)
TERMINATE = Method("mii_hpc.v1.Deployment", "Terminate", pb.TerminateRequest, pb.TerminateResponse)
ROTATE_TOKEN = Method("mii_hpc.v1.Deployment", "RotateToken", pb.RotateTokenRequest, pb.RotateTokenResponse)
ATTEND = Method("mii_hpc.v1.Membership", "Attend", pb.RankReport, pb.RankOrder)


def pack_request(request: GenerationRequest) -> pb.GenerateRequest:
    """Return the message for a request; only options that differ from their default travel.

    Raises InvalidRequestError when the prompt or a stop string is no valid Unicode.
    """
    for name, texts in (("prompt", (request.prompt,)), ("stop", request.params.stop)):
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"{name}: not valid Unicode at character {error.start}: {error.reason}") from None
    params = pb.GenerateParams(**request.params.model_dump(exclude_defaults=True))
    return pb.GenerateRequest(id=request.id, prompt=request.prompt, params=params)


def unpack_request(payload: bytes) -> GenerationRequest:
    """Return the request in a message.

    Raises InvalidRequestError when the bytes are no such message, or an option is out of its range.
    """
    try:
        message = pb.GenerateRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidRequestError(f"the request is not a valid GenerateRequest message: {error}") from None
    given = {field.name: value for field, value in message.params.ListFields()}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    return GenerationRequest(message.id, message.prompt, validate(GenerateParamsConfig, given))


def pack_response(piece: Response) -> pb.GenerateChunk:
    """Return the message for a piece of an answer."""
    return pb.GenerateChunk(
        text=piece.generated_text,
        token_ids=piece.token_ids,
        logprobs=piece.logprobs,
        index=piece.index,
        prompt_length=piece.prompt_length,
        generated_length=piece.generated_length,
        finish_reason=piece.finish_reason if piece.ended else "",
    )


def unpack_response(message: pb.GenerateChunk, replica: int = 0) -> Response:
    """Return the piece of an answer in a message, as served by that replica."""
    return Response(
        generated_text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        index=message.index,
        prompt_length=message.prompt_length,
        generated_length=message.generated_length,
        finish_reason=GenerationFinishReason(message.finish_reason or "none"),
        replica=replica,
    )


def pack_load(load: Load) -> pb.LoadResponse:
    """Return the message for an engine's load."""
    return pb.LoadResponse(**dataclasses.asdict(load))


def unpack_load(message: pb.LoadResponse) -> Load:
    """Return the engine's load in a message."""
    return Load(**{field.name: getattr(message, field.name) for field in dataclasses.fields(Load)})


async def abort(context: grpc.aio.ServicerContext, error: MIIError) -> NoReturn:
    """End a call with one of our errors, so that the client raises the same class with the same message."""
    code = next(_CODES[kind] for kind in (*type(error).__mro__, errors.RequestError) if kind in _CODES)
    await context.abort(code, str(error), ((ERROR_KEY, type(error).__name__),))
    raise AssertionError("context.abort() does not return")


def error_of(failure: grpc.aio.AioRpcError) -> MIIError:
    """Return our error for a failed call: the class that the server named, else the one for its status code."""
    name = own_error_name(failure)
    kind = getattr(errors, name, None) if name else None
    message = failure.details() or failure.code().name
    if isinstance(kind, type) and issubclass(kind, MIIError):
        return kind(message)
    by_code = {code: kind for kind, code in _CODES.items()}
    return by_code.get(failure.code(), errors.RequestError)(f"{message} ({failure.code().name})")


def own_error_name(failure: grpc.aio.AioRpcError) -> str | None:
    """Return the error class that one of our servers named, or None when gRPC itself failed the call."""
    return next((str(value) for key, value in failure.trailing_metadata() or () if key == ERROR_KEY), None)
