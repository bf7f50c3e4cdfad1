"""The client for plain scripts: it runs an AsyncMIIClient on a thread of its own, and lets go of it before a fork."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

from mii_hpc.clients.asynchronous import CLOSED, AsyncMIIClient
from mii_hpc.clients.status import DeploymentStatus
from mii_hpc.config import MIIConfig
from mii_hpc.deployments.lookup import Home
from mii_hpc.errors import InvalidRequestError, RequestCancelledError, UnavailableError
from mii_hpc.generation import Description, Prompt, Prompts, Response, Tokenization, as_prompts, joined

T = TypeVar("T")


class MIIClient:
    """A client for plain scripts. It works inside a running event loop, from several threads, and after a fork.

    See AsyncMIIClient for what the arguments mean and what the methods guarantee; these are the same, blocking.
    """

    def __init__(self, mii_config: MIIConfig, host: str = "localhost", *, home: Home | None = None) -> None:
        self.mii_config = mii_config
        self._host = host
        self._home = home
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._calls = 0
        self._new_client()  # refuses what is wrong now, not at the first call
        _Forks.watch(self)

    def generate(
        self,
        prompts: Prompts,
        streaming_fn: Callable[[list[Response]], object] | None = None,
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> list[Response]:
        """Return the answers to one or more prompts, in their order. See AsyncMIIClient.generate()."""
        if streaming_fn is None:
            return self._run(lambda client: client.generate(prompts, timeout=timeout, **options))
        several = as_prompts(prompts)
        if len(several) != 1:
            raise InvalidRequestError(f"streaming_fn: takes one prompt at a time, not {len(several)}")
        pieces = []
        for piece in self.stream(several[0], timeout=timeout, **options):  # so that the function runs on this thread
            pieces.append(piece)
            streaming_fn([piece])
        return joined(pieces)

    __call__ = generate

    def stream(
        self, prompt: Prompt | Sequence[int], *, timeout: float | None = None, **options: Any
    ) -> Iterator[Response]:
        """Yield the pieces of one prompt's answer as they are made. Leaving the iteration cancels the request."""
        with self._working() as worker:
            pieces = worker.client.stream(prompt, timeout=timeout, **options)
            turn = asyncio.Lock()  # what waits for a piece has ended, also by Ctrl-C, before the stream is closed

            async def following(_: AsyncMIIClient) -> Response | None:
                async with turn:
                    return await anext(pieces, None)

            async def ending(_: AsyncMIIClient) -> None:
                async with turn:
                    await pieces.aclose()

            try:
                while (piece := worker.run(following)) is not None:
                    yield piece
            finally:
                with contextlib.suppress(RequestCancelledError):  # closed meanwhile, and with it the stream
                    worker.run(ending)

    def tokenize(self, prompt: Prompt | Sequence[int], *, plain: bool = False) -> Tokenization:
        """Return a prompt as the model sees it. See AsyncMIIClient.tokenize()."""
        return self._run(lambda client: client.tokenize(prompt, plain=plain))

    def describe(self) -> Description:
        """Return what is served. See AsyncMIIClient.describe()."""
        return self._run(lambda client: client.describe())

    def status(self) -> DeploymentStatus:
        """Return the state of the deployment and of its replicas."""
        return self._run(lambda client: client.status())

    def terminate_server(self) -> None:
        """End the deployment; return when its job has withdrawn it. See AsyncMIIClient.terminate_server()."""
        self._run(lambda client: client.terminate_server())

    def close(self) -> None:
        """Close the connection. The deployment goes on, and a later call connects again.

        Calls that other threads are in raise RequestCancelledError.
        """
        with self._lock:
            worker, self._worker = self._worker, None
        if worker is not None and worker.pid == os.getpid():
            worker.stop()

    def rotate_token(self, *, cancel_guests: bool = False) -> None:
        """Make the deployment's old tokens open nothing from now on. See AsyncMIIClient.rotate_token()."""
        self._run(lambda client: client.rotate_token(cancel_guests=cancel_guests))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Callable[[AsyncMIIClient], Coroutine[Any, Any, T]]) -> T:
        with self._working() as worker:
            return worker.run(call)

    @contextlib.contextmanager
    def _working(self) -> Iterator[_Worker]:
        """Yield the worker, and count the call that it is for."""
        with self._lock:
            if self._worker is None:
                self._worker = _Worker(self._new_client())
            elif self._worker.pid != os.getpid():
                raise UnavailableError(
                    "this process was forked while requests of its parent were running, after which gRPC does not "
                    "work in it; fork before or between requests, or start processes with 'spawn'",
                    deployment_name=self.mii_config.deployment_name,
                )
            worker = self._worker
            self._calls += 1
        try:
            yield worker
        finally:
            with self._lock:
                self._calls -= 1

    def _new_client(self) -> AsyncMIIClient:
        return AsyncMIIClient(self.mii_config, self._host, home=self._home)

    def _before_fork(self) -> None:
        """Let go of gRPC, which survives a fork only while none of its threads is at work."""
        self._lock.acquire()
        if self._calls == 0 and self._worker is not None and self._worker.pid == os.getpid():
            self._worker.stop()
            self._worker = None

    def _after_fork(self) -> None:
        """Go on, in the parent as in the child; the next call connects anew."""
        self._lock.release()


class _Forks:
    """The clients of this process, each of which is called before and after a fork."""

    _clients: ClassVar[weakref.WeakSet[MIIClient] | None] = None
    _held: ClassVar[list[MIIClient]] = []

    @classmethod
    def watch(cls, client: MIIClient) -> None:
        if cls._clients is None:
            cls._clients = weakref.WeakSet()
            os.register_at_fork(before=cls._before, after_in_parent=cls._after, after_in_child=cls._after)
        cls._clients.add(client)

    @classmethod
    def _before(cls) -> None:
        cls._held = list(cls._clients or ())
        for client in cls._held:
            client._before_fork()
        gc.collect()  # gRPC stops its threads when the last of its objects is freed

    @classmethod
    def _after(cls) -> None:
        for client in cls._held:
            client._after_fork()
        cls._held = []


class _Worker:
    """A thread with an event loop, in which one AsyncMIIClient lives."""

    def __init__(self, client: AsyncMIIClient) -> None:
        self.client = client
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mii-client", daemon=True)
        self._thread.start()

    def run(self, call: Callable[[AsyncMIIClient], Coroutine[Any, Any, T]]) -> T:
        """Run a call in the loop and return its result. Raises RequestCancelledError when the worker is stopped."""
        submitted: list[asyncio.Task[Any] | None] = []

        async def awaited() -> T:
            submitted.append(asyncio.current_task())
            return await call(self.client)

        async def abandoned() -> None:
            for task in filter(None, submitted):
                task.cancel()

        try:
            with self._lock:  # what is submitted runs before stop() ends the loop, or is not submitted
                if self._stopped:
                    raise RequestCancelledError(CLOSED)
                future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
            return future.result()
        except concurrent.futures.CancelledError:
            raise RequestCancelledError(CLOSED) from None
        except BaseException:  # Ctrl-C here ends the request there, also when it comes while the call is submitted
            with self._lock:
                if not self._stopped:
                    asyncio.run_coroutine_threadsafe(abandoned(), self._loop)
            raise

    def stop(self) -> None:
        """Close the client, end the calls that run, and then the thread."""
        with self._lock:
            self._stopped = True
            ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self.client.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
