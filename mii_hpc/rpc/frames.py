"""Many requests on one stream: what there is to say of them at once travels in one frame.

A message costs each process that it passes a tenth of a millisecond of Python, whatever is in it. So a caller has one
stream for all its requests, which it numbers, and the tokens that an engine makes in one step come back together.

Nobody on a stream waits for another: what cannot be sent yet is joined, answer by answer. A slow reader gets fewer and
longer pieces, and no more waits for it than its answers. Who cannot follow all the streams that he reads lets their
servers pause between two frames.

A server that has nothing to say sends an empty frame as a sign of life. To a caller, a silent server is a lost one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator

import grpc.aio
from google.protobuf.message import DecodeError

from mii_hpc._proto import mii_hpc_pb2 as pb
from mii_hpc.errors import InvalidRequestError, MIIError, QueueFullError
from mii_hpc.rpc import liveness, wire
from mii_hpc.rpc.liveness import Pulse

log = logging.getLogger(__name__)

FRAME_BYTES = 2**20
"""A frame with so many bytes takes in no more."""
FRAME_REQUESTS = 1024
"""A frame has no more requests, and cancels no more: a message of tiny ones would take a server minutes."""
FINISH_SECONDS = 0.5
"""How long a client that is closed waits for the server to end the stream."""

FRAMES_PER_SECOND = 5000
"""Of all streams that a process reads. To read a frame takes it a tenth of a millisecond, however little is in it."""
RATE_SECONDS = 0.25
"""The time in which frames are counted."""
LEAST_PAUSE = 0.004
"""In seconds: so few streams that a shorter one would do need none."""
MOST_PAUSE = 1.0

_CANCELLED = pb.RequestFrame.DESCRIPTOR.fields_by_name["cancelled"].number

Metadata = tuple[tuple[str, str], ...]


class LostError(Exception):
    """A stream has ended before the request did.

    `failure` is what gRPC says of it; None where it ended in order, or because the server `is_silent`.
    """

    def __init__(self, failure: grpc.aio.AioRpcError | None = None, *, is_silent: bool = False) -> None:
        super().__init__(failure)
        self.failure, self.is_silent = failure, is_silent

    @property
    def is_of_connection(self) -> bool:
        """Whether the connection broke, or leads to nobody, and with it whatever else went over it."""
        return self.is_silent or (self.failure is not None and wire.is_lost(self.failure))


class ClosedError(LostError):
    """It was this side that has closed the stream."""


class StreamGroup:
    """The streams that a process reads side by side.

    Attributes:
        is_crowded: whether more frames come of late than it can follow.
    """

    def __init__(self) -> None:
        self._busy: set[RequestStream] = set()
        self.is_crowded = False
        self._since, self._frames = -math.inf, 0

    @property
    def pause(self) -> float:
        """How long each server is to pause between two frames, in seconds, so that it can follow all."""
        pause = len(self._busy) / FRAMES_PER_SECOND
        return pause if self.is_crowded and pause >= LEAST_PAUSE else 0.0

    def count(self, now: float) -> None:
        """Count a frame that has come now, in seconds."""
        self._frames += 1
        if now < self._since + RATE_SECONDS:
            return
        bound = FRAMES_PER_SECOND / 2 if self.is_crowded else FRAMES_PER_SECOND  # which pausing keeps them from
        self.is_crowded = self._frames > bound * (now - self._since)
        self._since, self._frames = now, 0

    def note(self, stream: RequestStream) -> None:
        """Note whether a stream has requests."""
        if len(stream):
            self._busy.add(stream)
        else:
            self._busy.discard(stream)


class RequestStream:
    """The caller's side. Belongs to one event loop; closed once it has been without a request for `idle_seconds`.

    It ends when the server has given no sign of life for liveness.SILENT_SECONDS. The server pauses between two frames
    as the `group` says, unless that is about as long as what it was told before.
    """

    def __init__(
        self,
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes],
        metadata: Metadata,
        idle_seconds: float | None = None,
        group: StreamGroup | None = None,
    ) -> None:
        self.method, self.metadata = method, metadata
        self.has_ended = False
        self._group = group or StreamGroup()
        self._outbox = _Requests(self._group)
        self._numbers = itertools.count()
        self._open: dict[int, tuple[Callable[[bytes], None], asyncio.Future[None]]] = {}
        self._idle_seconds = idle_seconds
        self._idle: asyncio.TimerHandle | None = None
        try:
            self._call = method(self._outbox.frames(), metadata=metadata)
        except grpc.aio.UsageError:  # the channel is closed
            raise ClosedError from None
        self._pulse = Pulse()
        self._reading = asyncio.create_task(self._read())
        self._listening = asyncio.create_task(self._end_when_silent())

    def __len__(self) -> int:
        """Return how many requests have not ended."""
        return len(self._open)

    @contextlib.contextmanager
    def request(
        self, payload: bytes, take: Callable[[bytes], None], *, timeout: float | None = None, position: str = ""
    ) -> Iterator[asyncio.Future[None]]:
        """Send a request, a GenerateRequest; yield the future of its end. `take` is called with each chunk as it comes.

        The future raises the server's error, or LostError when the stream ends before, as this does when it has ended.
        Leaving the context cancels the request.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        if self.has_ended:
            raise LostError
        if self._idle is not None:
            self._idle.cancel()
        self._open[number] = take, ended
        self._group.note(self)
        self._outbox.add(pb.NumberedRequest(number=number, request=payload, timeout=timeout or 0, position=position))
        try:
            yield ended
        finally:
            if self._open.pop(number, None) is not None:
                self._outbox.cancel(number)
                ended.cancel()
            self._rest()

    def close(self) -> None:
        """End the stream, and the requests that are still open, here and at the server."""
        self._end(ClosedError())

    async def finish(self) -> None:
        """Close the stream, and return once the server has ended it, too, or hardly will.

        What comes of a call that is cancelled comes later; gRPC prints a traceback when the event loop is closed then.
        """
        for number in self._open:
            self._outbox.cancel(number)
        self._forget(ClosedError())
        try:
            await asyncio.wait({self._reading}, timeout=FINISH_SECONDS)
        finally:
            self.close()

    async def _read(self) -> None:
        lost = LostError()
        try:
            async for frame in self._call:
                self._pulse.beat()
                self._group.count(time.monotonic())
                self._outbox.tell_pause()
                for piece in pb.AnswerFrame.FromString(frame).pieces:
                    self._take(piece)
        except grpc.aio.AioRpcError as failure:
            lost = ClosedError(failure) if wire.is_cancelled(failure) else LostError(failure)
        except asyncio.CancelledError:  # the channel was closed, or the event loop ends
            lost = ClosedError()
        finally:
            self._end(lost)

    async def _end_when_silent(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # whose traceback would hold the stream after its end
            await self._pulse.lost()
            self._end(LostError(is_silent=True))

    def _take(self, piece: pb.Piece) -> None:
        if piece.number not in self._open:  # cancelled meanwhile
            return
        take, ended = self._open[piece.number]
        if piece.chunk:
            try:
                take(piece.chunk)
            except Exception as error:  # noqa: BLE001 (the boundary: it concerns this request alone)
                _resolve(ended, wire.as_ours(error))
        if piece.ends:
            del self._open[piece.number]
            _resolve(ended, wire.unpack_failure(piece.failure) if piece.HasField("failure") else None)

    def _rest(self) -> None:
        """Close the stream in a while, unless there is another request by then."""
        self._group.note(self)
        if self._idle is not None:
            self._idle.cancel()
        if not self._open and not self.has_ended and self._idle_seconds is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self.close)

    def _end(self, lost: LostError) -> None:
        self._forget(lost)
        self._call.cancel()
        self._listening.cancel()

    def _forget(self, lost: LostError) -> None:
        """Send no more, and end the requests here."""
        self.has_ended = True
        self._outbox.close()
        if self._idle is not None:
            self._idle.cancel()
        ending, self._open = self._open, {}
        self._group.note(self)
        for _, ended in ending.values():
            _resolve(ended, lost)


class ServedRequest:
    """A request, as its server has it.

    Attributes:
        payload: a GenerateRequest as bytes, perhaps.
        timeout: how long its caller waits, in seconds; None without a bound.
        position: among the prompts of one call, as its caller says it.
    """

    def __init__(self, message: pb.NumberedRequest, server: _Server) -> None:
        self.payload, self.position = message.request, message.position
        self.timeout = message.timeout if 0 < message.timeout < math.inf else None
        self._number, self._server = message.number, server

    def send(self, index: int, chunk: bytes) -> None:
        """Send a GenerateChunk of that one of its answers, with the next frame."""
        self._server.answers.add(self._number, index, chunk)

    def fail(self, error: MIIError) -> None:
        """End it with an error, whatever is being done for it."""
        self._server.end(self._number, error)


Handler = Callable[[ServedRequest], Awaitable[None]]
"""Answers a request: sends what comes of it, returns when it is complete, or raises why it is not. It is cancelled when
the caller wants the answer no longer."""


async def serve(
    frames: AsyncIterator[bytes], answer: Handler, *, idle_seconds: float | None = None, limit: int | None = None
) -> AsyncGenerator[bytes]:
    """Serve one caller's stream: take its frames, yield those of the answers. Requests begin in the caller's order.

    When this ends, so do the requests. Of what is wrong with a request, its caller is told in a frame. Raises
    InvalidRequestError when the caller sends what is no frame, or has had no request open for `idle_seconds`;
    above `limit`, requests are refused with QueueFullError.
    """
    server = _Server(answer, idle_seconds, limit)
    reading = asyncio.create_task(server.read(frames))
    try:
        async with contextlib.aclosing(server.answers.frames()) as sent:
            async for frame in sent:
                yield frame
        server.check()
    finally:
        reading.cancel()
        await server.stop()


class _Server:
    """What `serve` does on one stream."""

    def __init__(self, answer: Handler, idle_seconds: float | None, limit: int | None) -> None:
        self.answers = _Answers()
        self._answer, self._idle_seconds, self._limit = answer, idle_seconds, limit
        self._running: dict[int, asyncio.Task[None]] = {}
        self._failure: MIIError | None = None
        self._is_complete = False
        """Whether the caller sends no more."""
        self._idle: asyncio.TimerHandle | None = None
        self._rest()

    async def read(self, frames: AsyncIterator[bytes]) -> None:
        began = False
        try:
            async for frame in frames:
                _check(frame)
                message = pb.RequestFrame.FromString(frame)
                self.answers.pause = message.pause
                for request in message.requests:
                    self._begin(request)
                    began = True
                for number in message.cancelled:
                    self._drop(number)
                await self.answers.room()
            if not began:
                self._fail(InvalidRequestError("the call has ended without a request"))
        except DecodeError as error:
            self._fail(InvalidRequestError(f"the call has sent what is not a valid RequestFrame message: {error}"))
        except Exception as error:  # noqa: BLE001 (whatever it is, the stream ends with it)
            self._fail(wire.as_ours(error))
        self._is_complete = True
        self._rest()

    def end(self, number: int, error: MIIError | None = None) -> None:
        """End a request, and tell its caller."""
        if self._drop(number):
            self.answers.end(number, error)

    def check(self) -> None:
        """Raise what the stream has ended with."""
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Cancel what still runs."""
        self._is_complete = True
        if self._idle is not None:
            self._idle.cancel()
        running, self._running = list(self._running.values()), {}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _begin(self, request: pb.NumberedRequest) -> None:
        if request.number in self._running:
            raise InvalidRequestError(f"number={request.number}: a request of the stream that has not ended has it")
        if self._limit is not None and len(self._running) >= self._limit:
            what = f"{self._limit} requests of one client are open; try again later"
            return self.answers.end(request.number, QueueFullError(what))
        if self._idle is not None:
            self._idle.cancel()
        self._running[request.number] = asyncio.create_task(self._run(request.number, ServedRequest(request, self)))
        return None

    async def _run(self, number: int, request: ServedRequest) -> None:
        try:
            await self._answer(request)
        except Exception as error:  # noqa: BLE001 (the boundary: whatever went wrong concerns this request alone)
            self.end(number, wire.as_ours(error))
        else:
            self.end(number)

    def _drop(self, number: int) -> bool:
        """Forget a request, and return whether there was one; what is being done for it is cancelled."""
        task = self._running.pop(number, None)
        if task is None:
            return False
        if task is not asyncio.current_task():
            task.cancel()
        self._rest()
        return True

    def _rest(self) -> None:
        """See to the end of the stream when no request is open: after the caller's last, or a while."""
        if self._running:
            return
        if self._is_complete:
            self.answers.close()
        elif self._idle_seconds is not None:
            what = InvalidRequestError(f"the call has had no request within {self._idle_seconds:.0f} s")
            self._idle = asyncio.get_running_loop().call_later(self._idle_seconds, self._fail, what)

    def _fail(self, error: MIIError) -> None:
        """End the stream."""
        self._failure = self._failure or error
        self.answers.close()


def _check(frame: bytes) -> None:
    """Raise InvalidRequestError for a frame of too many requests, before they take the gigabytes that they may."""
    count = 0
    for number, begin, end in wire.fields_of(frame):
        count += 1 + (end - begin) // wire.VARINT_BYTES if number == _CANCELLED else 1
        if count > 2 * FRAME_REQUESTS:
            raise InvalidRequestError(f"a frame begins or cancels more than {FRAME_REQUESTS} requests")


class _Outbox(ABC):
    """What is to be sent, until the stream has room for it."""

    def __init__(self) -> None:
        self._filled = asyncio.Event()
        self._is_closed = False
        self.pause = 0.0
        """How long to wait at least after what was sent, in seconds; longer than MOST_PAUSE means not at all."""

    async def frames(self) -> AsyncGenerator[bytes]:
        """Yield frames as there is something to send, and room, until it is closed and empty; empty ones meanwhile."""
        due = 0.0
        while not self._is_closed:
            if not self._filled.is_set() and not await self._fills():
                yield b""
                continue
            # Also when nothing is to be waited for: so that what follows at once travels along, such as the end behind
            # a last piece.
            await asyncio.sleep(due - time.monotonic())
            self._filled.clear()
            for frame in self._taken():
                yield frame.SerializeToString()
            if 0 < self.pause <= MOST_PAUSE:
                due = time.monotonic() + self.pause

    async def _fills(self) -> bool:
        """Wait until there is something to send; return False where a sign of life is to be sent before."""
        return await self._filled.wait()

    def close(self) -> None:
        """Send what is there, and no more."""
        self._is_closed = True
        self._filled.set()

    @abstractmethod
    def _taken(self) -> Iterator[pb.RequestFrame | pb.AnswerFrame]:
        """Take out what is to be sent, in frames."""


class _Requests(_Outbox):
    def __init__(self, group: StreamGroup) -> None:
        super().__init__()
        self._group = group
        self._told = 0.0
        self._is_telling = False
        self._begun: list[pb.NumberedRequest] = []
        self._cancelled: list[int] = []

    def add(self, request: pb.NumberedRequest) -> None:
        self._begun.append(request)
        self._filled.set()

    def cancel(self, number: int) -> None:
        self._cancelled.append(number)
        self._filled.set()

    def tell_pause(self) -> None:
        """Say how long to pause, where that is far from what was said before."""
        told, pause = max(self._told, LEAST_PAUSE), max(self._group.pause, LEAST_PAUSE)
        if not told / 2 <= pause <= told * 2:
            self._is_telling = True
            self._filled.set()

    def _taken(self) -> Iterator[pb.RequestFrame]:
        begun, self._begun = self._begun, []
        cancelled, self._cancelled = self._cancelled, []
        is_telling, self._is_telling = self._is_telling, False
        self._told = pause = self._group.pause
        frame, size = pb.RequestFrame(pause=pause), 0
        for request in begun:
            frame.requests.append(request)
            size += len(request.request)
            if size >= FRAME_BYTES or len(frame.requests) == FRAME_REQUESTS:
                yield frame
                frame, size = pb.RequestFrame(pause=pause), 0
        for first in range(0, len(cancelled), FRAME_REQUESTS):
            frame.cancelled.extend(cancelled[first : first + FRAME_REQUESTS])
            yield frame
            frame = pb.RequestFrame(pause=pause)
        if frame.requests or (is_telling and not begun and not cancelled):
            yield frame


class _Answers(_Outbox):
    def __init__(self) -> None:
        super().__init__()
        self._beat_seconds = liveness.BEAT_SECONDS
        self._chunks: list[tuple[int, bytearray]] = []
        self._latest: dict[tuple[int, int], bytearray] = {}
        self._ends: list[tuple[int, MIIError | None]] = []
        self._has_room = asyncio.Event()

    async def _fills(self) -> bool:
        try:
            async with asyncio.timeout(self._beat_seconds):
                return await self._filled.wait()
        except TimeoutError:
            return False

    async def room(self) -> None:
        """Wait until no more requests have ended than a frame begins: who reads no answers is asked nothing more."""
        while len(self._ends) > FRAME_REQUESTS and not self._is_closed:
            self._has_room.clear()
            await self._has_room.wait()

    def add(self, number: int, index: int, chunk: bytes) -> None:
        latest = self._latest.get((number, index))
        if latest is not None and len(latest) < FRAME_BYTES:
            latest += chunk
            return
        self._latest[number, index] = latest = bytearray(chunk)
        self._chunks.append((number, latest))
        self._filled.set()

    def end(self, number: int, error: MIIError | None) -> None:
        self._ends.append((number, error))
        self._filled.set()

    def _taken(self) -> Iterator[pb.AnswerFrame]:
        chunks, self._chunks, self._latest = self._chunks, [], {}
        ends, self._ends = self._ends, []
        self._has_room.set()
        frame, size = pb.AnswerFrame(), 0
        for number, chunk in chunks:
            piece = frame.pieces.add()  # fields that are named to it take it twice the time
            piece.number, piece.chunk = number, bytes(chunk)
            size += len(chunk)
            if size >= FRAME_BYTES:
                yield frame
                frame, size = pb.AnswerFrame(), 0
        for number, error in ends:
            frame.pieces.add(number=number, ends=True, failure=error and wire.pack_failure(error))
        if frame.pieces:
            yield frame


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # as seen: whoever has left need not look
