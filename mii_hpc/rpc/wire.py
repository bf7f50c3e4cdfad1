"""The one boundary between our types and gRPC's: dataclasses and protobuf, errors and status codes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from pydantic_core import from_json

from mii_hpc import errors
from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.config import GenerateParamsConfig, validate
from mii_hpc.constants import GenerationFinishReason
from mii_hpc.errors import InvalidRequestError, MIIError
from mii_hpc.generation import (
    GUEST,
    OWNER,
    Chat,
    Description,
    GenerationRequest,
    Histogram,
    Load,
    Prompt,
    Response,
    ResumedAnswer,
    Tokenization,
    TopLogprobs,
)

log = logging.getLogger(__name__)

LOCALLY = "Locally cancelled by application!"
"""What gRPC says of a call that was cancelled at this end."""
MAX_MESSAGE_BYTES = 16 * 2**20
"""No message is longer, in either direction."""
MAX_POSITION = 100
"""A BatchPosition has no more characters."""
MAX_LISTED = 301
"""Of an option that is a list, what comes later is not looked at: it is too long by then."""
MAX_IDS = 2**22
"""No request has more token ids."""
MAX_MARKS = 2**20
"""No conversation has more commas, colons and opening brackets, which bound how many values there are to be made."""
MAX_FIELDS = 512
"""No request has more fields, with those of its options. Millions of empty ones would take gigabytes."""
VARINT_BYTES = 10
"""A number has no more bytes in a message."""
MAX_WORDS = 600
"""An error's message is cut to so many characters, of up to 12 bytes on the wire: gRPC has room for 8 KiB."""
ERROR_KEY = "mii-error"
"""Trailing metadata: an error's class and facts, as JSON. Its message is the status's."""

_PARAMS = pb.GenerateRequest.DESCRIPTOR.fields_by_name["params"].number

Context = grpc.aio.ServicerContext[Any, Any]
"""The server's side of a call."""

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
_OF_GRPC: dict[grpc.StatusCode, type[MIIError]] = {
    **{code: kind for kind, code in _CODES.items()},
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.InvalidRequestError,
}
"""What a status means that gRPC itself gives, and none of our servers. UNAVAILABLE alone says that the connection is
lost; all others concern the one call. RESOURCE_EXHAUSTED is a message above the limit."""


@dataclasses.dataclass(frozen=True)
class BatchPosition:
    """The position of a prompt among those of one call."""

    batch: str
    """An id of the call, the same for all its prompts."""
    index: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch}/{self.index}/{self.size}"

    @classmethod
    def parse(cls, text: str) -> BatchPosition | None:
        """Return the position that a text names, or None when it names none."""
        if len(text) > MAX_POSITION:
            return None
        batch, *numbers = text.split("/")
        if len(numbers) != 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
            return None
        position = cls(batch, int(numbers[0]), int(numbers[1]))
        return position if position.index < position.size else None


class Method(StrEnum):
    """The path of each RPC of proto/mii_hpc.proto."""

    GENERATE = "/mii_hpc.v1.Inference/Generate"
    TOKENIZE = "/mii_hpc.v1.Inference/Tokenize"
    DESCRIBE = "/mii_hpc.v1.Inference/Describe"
    LOAD = "/mii_hpc.v1.Engine/Load"
    STATUS = "/mii_hpc.v1.Deployment/Status"
    TERMINATE = "/mii_hpc.v1.Deployment/Terminate"
    ROTATE_TOKEN = "/mii_hpc.v1.Deployment/RotateToken"
    JOIN = "/mii_hpc.v1.Membership/Join"


def pack_request(request: GenerationRequest) -> pb.GenerateRequest:
    """Return the message for a request; only options that differ from their default travel.

    Raises InvalidRequestError when the prompt or a stop string is no valid Unicode, or all is too long to travel.
    """
    text, token_ids, chat = _pack_prompt(request.prompt)
    _check_unicode("stop", "".join(request.params.stop))
    params = pb.GenerateParams(**request.params.model_dump(exclude_defaults=True))
    message = pb.GenerateRequest(id=request.id, prompt=text, prompt_ids=token_ids, chat=chat, params=params)
    set_resume(message, request.resume)
    check_size(message.ByteSize())
    return message


def check_size(size: int) -> None:
    """Raise InvalidRequestError when a caller's request of so many bytes is too long."""
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(f"prompt: the request has {size} bytes; {MAX_MESSAGE_BYTES} are allowed")


def fields_of(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield a message's fields as they come: number, and where the value begins and ends. Nothing is parsed for it.

    What comes of bytes that are no message means nothing; parsing refuses them.
    """
    at = 0
    while at < len(message):
        tag, begin = _varint(message, at)
        end = begin
        match tag & 7:
            case 0:
                end = _varint(message, begin)[1]
            case 1:
                end += 8
            case 2:
                size, begin = _varint(message, begin)
                end = begin + size
            case 5:
                end += 4
        yield tag >> 3, begin, end
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number that is written there, and where it ends: at the end of the message where it does not."""
    number = 0
    for place, byte in enumerate(message[at : at + VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    return 0, len(message)


def parse_request(payload: bytes) -> pb.GenerateRequest:
    """Return the message in some bytes.

    Raises InvalidRequestError when they are no such message, or one that would take much memory or time for its bytes.
    """
    if next(itertools.islice(_fields_of_request(payload), MAX_FIELDS, None), None):
        raise InvalidRequestError(f"the request has more than {MAX_FIELDS} fields")
    try:
        message = pb.GenerateRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidRequestError(f"the request is not a valid GenerateRequest message: {error}") from None
    _check_ids(len(message.prompt_ids) + sum(len(answer.token_ids) for answer in message.resume))
    return message


def _fields_of_request(payload: bytes) -> Iterator[tuple[int, int, int]]:
    for number, begin, end in fields_of(payload):
        yield number, begin, end
        if number == _PARAMS:
            yield from fields_of(payload[begin:end])


def _check_ids(count: int) -> None:
    if count > MAX_IDS:
        raise InvalidRequestError(f"prompt: the request has {count} token ids; {MAX_IDS} are allowed")


def unpack_request(message: pb.GenerateRequest) -> GenerationRequest:
    """Return the request in a message. Raises InvalidRequestError when an option is out of its range."""
    prompt = _unpack_prompt(message.prompt, message.prompt_ids, message.chat)
    role, _, address = message.caller.partition(" ")
    caller = GUEST if role == GUEST else OWNER, address
    return GenerationRequest(message.id, prompt, unpack_params(message), get_resume(message), message.admitted, caller)


def unpack_params(message: pb.GenerateRequest) -> GenerateParamsConfig:
    """Return the options in a message. Raises InvalidRequestError when one is out of its range."""
    given = {field.name: value for field, value in message.params.ListFields()}
    for name in {"stop", "stop_token_ids"} & given.keys():
        given[name] = tuple(given[name][:MAX_LISTED])
    if "logit_bias" in given:
        given["logit_bias"] = dict(itertools.islice(given["logit_bias"].items(), MAX_LISTED))
    return validate(GenerateParamsConfig, given)


def set_resume(message: pb.GenerateRequest, resume: Sequence[ResumedAnswer]) -> None:
    """Let the request in a message go on from there."""
    del message.resume[:]
    message.resume.extend(pb.ResumedAnswer(**dataclasses.asdict(answer)) for answer in resume)


def get_resume(message: pb.GenerateRequest) -> tuple[ResumedAnswer, ...]:
    """Return from where the request in a message goes on."""
    answers = message.resume[:MAX_LISTED]
    return tuple(ResumedAnswer(tuple(answer.token_ids), answer.characters, answer.ended) for answer in answers)


def pack_tokenize(prompt: Prompt, plain: bool) -> pb.TokenizeRequest:
    """Return the message for a prompt to tokenize. Raises InvalidRequestError when it is no valid Unicode."""
    text, token_ids, chat = _pack_prompt(prompt)
    return pb.TokenizeRequest(prompt=text, token_ids=token_ids, chat=chat, plain=plain)


def unpack_tokenize(payload: bytes) -> tuple[Prompt, bool]:
    """Return the prompt in a message, and whether it is plain. Raises InvalidRequestError when it is no message."""
    try:
        message = pb.TokenizeRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidRequestError(f"the request is not a valid TokenizeRequest message: {error}") from None
    _check_ids(len(message.token_ids))
    return _unpack_prompt(message.prompt, message.token_ids, message.chat), message.plain


def pack_tokenization(result: Tokenization) -> pb.TokenizeResponse:
    """Return the message for a prompt's tokens."""
    return pb.TokenizeResponse(**dataclasses.asdict(result))


def unpack_tokenization(message: pb.TokenizeResponse) -> Tokenization:
    """Return the prompt's tokens in a message."""
    return Tokenization(tuple(message.token_ids), message.text, tuple(message.tokens))


def pack_description(description: Description) -> pb.DescribeResponse:
    """Return the message that says what is served."""
    return pb.DescribeResponse(description=json.dumps(dataclasses.asdict(description)))


def unpack_description(message: pb.DescribeResponse) -> Description:
    """Return what is served, from a message."""
    return Description(**json.loads(message.description))


def pack_response(piece: Response) -> bytes:
    """Return the message for a piece of an answer, as an engine made it. Raises InvalidRequestError when it is long."""
    # One is made for every token. Fields set one by one take 0.4 of the time that the constructor takes for all of
    # them, and what is seldom there costs nothing.
    message = pb.GenerateChunk()
    message.text.append(piece.generated_text)
    message.token_ids.extend(piece.token_ids)
    message.prompt_length = piece.prompt_length
    message.generated_length = piece.generated_length
    if piece.index:
        message.index = piece.index
    if piece.logprobs or piece.prompt_logprobs:
        message.logprobs.extend(piece.logprobs)
        message.prompt_logprobs.extend(piece.prompt_logprobs)
    if piece.ended:
        message.finish_reason = piece.finish_reason
    if piece.top_logprobs or piece.prompt_top_logprobs:
        message.top_logprobs.extend(_pack_top(piece.top_logprobs))
        message.prompt_top_logprobs.extend(_pack_top(piece.prompt_top_logprobs))
    chunk = message.SerializeToString()
    if len(chunk) > MAX_MESSAGE_BYTES:
        raise InvalidRequestError(f"a piece of the answer has {len(chunk)} bytes; {MAX_MESSAGE_BYTES} are allowed")
    return chunk


def pack_server(replica: int, migrations: int) -> bytes:
    """Return what, behind a piece of an answer, makes it one of that replica's."""
    return pb.GenerateChunk(replica=replica, migrations=migrations).SerializeToString()


def unpack_response(chunk: bytes) -> Response:
    """Return the piece of an answer in a message."""
    message = pb.GenerateChunk.FromString(chunk)
    return Response(
        generated_text="".join(message.text),
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        top_logprobs=_unpack_top(message.top_logprobs),
        prompt_logprobs=tuple(message.prompt_logprobs),
        prompt_top_logprobs=_unpack_top(message.prompt_top_logprobs),
        index=message.index,
        prompt_length=message.prompt_length,
        generated_length=message.generated_length,
        finish_reason=GenerationFinishReason(message.finish_reason or "none"),
        replica=message.replica,
        migrations=message.migrations,
    )


def pack_load(load: Load) -> pb.LoadResponse:
    """Return the message for an engine's load."""
    return pb.LoadResponse(**dataclasses.asdict(load))


def unpack_load(message: pb.LoadResponse) -> Load:
    """Return the engine's load in a message."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(Load)}
    for name, value in values.items():
        if isinstance(value, pb.Histogram):
            values[name] = Histogram(tuple(value.counts), value.sum)
    return Load(**{**values, "finished": dict(message.finished)})


@contextlib.asynccontextmanager
async def answering(context: Context) -> AsyncIterator[None]:
    """End a call with the error that is raised within: one of ours as it is, any other as this one request's."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # noqa: BLE001 (the boundary: whatever went wrong concerns this call, and nobody else)
        await abort(context, as_ours(error))


def as_ours(error: Exception) -> MIIError:
    """Return an error as one of ours; one that nobody has foreseen is logged."""
    if isinstance(error, MIIError):
        return error
    log.error("a call has failed", exc_info=error)
    return errors.RequestError(f"the request has failed: {type(error).__name__}: {error}")


async def abort(context: Context, error: MIIError) -> NoReturn:
    """End a call with one of our errors: the client raises the same class with the same message and facts."""
    code = next(_CODES[kind] for kind in (*type(error).__mro__, errors.RequestError) if kind in _CODES)
    failure = pack_failure(error)
    await context.abort(code, failure.message, ((ERROR_KEY, failure.named),))


def error_of(failure: grpc.aio.AioRpcError) -> MIIError:
    """Return our error for a failed call: the one that the server named, else what gRPC's own status means."""
    message = failure.details() or failure.code().name
    return _named(failure, message) or _OF_GRPC.get(failure.code(), errors.RequestError)(
        f"{message} ({failure.code().name})"
    )


def pack_failure(error: MIIError) -> pb.Failure:
    """Return the message for an error."""
    named = {"class": type(error).__name__, "facts": {name: getattr(error, name) for name in error.facts}}
    message = str(error.args[0] if error.args else "")
    if len(message) > MAX_WORDS:
        message = message[:MAX_WORDS] + " ..."
    return pb.Failure(message=message, named=json.dumps(named))


def unpack_failure(failure: pb.Failure) -> MIIError:
    """Return the error in a message."""
    return _error(failure.message, failure.named) or errors.RequestError(failure.message)


def is_lost(failure: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed because the connection is lost, and not for anything that its server did with it."""
    return _named(failure) is None and _OF_GRPC.get(failure.code()) is errors.UnavailableError


def is_cancelled(failure: grpc.aio.AioRpcError) -> bool:
    """Whether a call was cancelled at this end: gRPC raises this, or asyncio.CancelledError, as it happens."""
    return is_interrupted(failure) and failure.details() == LOCALLY


def is_interrupted(failure: grpc.aio.AioRpcError) -> bool:
    """Whether gRPC has cancelled a call, at this end or of its own accord, as when others flood its server."""
    return _named(failure) is None and failure.code() is grpc.StatusCode.CANCELLED


def _pack_top(places: Iterable[TopLogprobs]) -> list[pb.TopLogprobs]:
    return [pb.TopLogprobs(token_ids=[t for t, _ in top], logprobs=[value for _, value in top]) for top in places]


def _unpack_top(places: Iterable[pb.TopLogprobs]) -> tuple[TopLogprobs, ...]:
    return tuple(tuple(zip(top.token_ids, top.logprobs, strict=True)) for top in places)


def _pack_prompt(prompt: Prompt) -> tuple[str, tuple[int, ...], str]:
    """Return a prompt as text, token ids and chat: two of them are empty."""
    if isinstance(prompt, Chat):
        try:
            return "", (), json.dumps(dataclasses.asdict(prompt))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"messages: not to be written as JSON: {error}") from None
    if not isinstance(prompt, str):
        return "", prompt, ""
    _check_unicode("prompt", prompt)
    return prompt, (), ""


def _unpack_prompt(text: str, token_ids: Sequence[int], chat: str) -> Prompt:
    if chat:
        if (marks := sum(map(chat.count, ",:[{"))) > MAX_MARKS:
            what = f"{marks} commas, colons and opening brackets; {MAX_MARKS} are allowed"
            raise InvalidRequestError(f"messages: the conversation has {what}")
        try:
            # Not json's, which goes as deep as Python's stack: what is collected there could not end in order.
            return Chat(**from_json(chat))
        except (ValueError, TypeError) as error:
            raise InvalidRequestError(f"the request's conversation is not a Chat: {error}") from None
    return tuple(token_ids) or text


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name}: not valid Unicode at character {error.start}: {error.reason}") from None


def _named(failure: grpc.aio.AioRpcError, message: str = "") -> MIIError | None:
    """Return the error that a call's server has named, if it has."""
    named = next((value for key, value in failure.trailing_metadata() or () if key == ERROR_KEY), "")
    return _error(message, named)


def _error(message: str, named: str | bytes) -> MIIError | None:
    try:
        known = json.loads(named)
        kind: type[MIIError] = getattr(errors, known["class"])
        if not issubclass(kind, MIIError):
            return None
        return kind(message, **{name: value for name, value in known["facts"].items() if name in kind.facts})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
