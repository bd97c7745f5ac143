"""ASGI responses that end their generation whatever happens: it fails, the client leaves, a deadline passes, we stop.

They write ASGI messages themselves, chunks directly to the server past the `send` wrappers of all layers: those look at
the start of a response alone. A chunk that the client's socket has room for goes there past ASGI itself (BodyWriter).
"""

from __future__ import annotations

import asyncio
import logging
import time
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, Protocol, TypeVar, cast

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nibble.service.gateway.boundary import SERVER_SEND
from nibble.service.gateway.completion import KEEP_ALIVE
from nibble.service.gateway.errors import ApiError, Cancelled, ServerFault
from nibble.service.gateway.generation import Delta, Generation
from nibble.service.gateway.http_protocol import BODY_WRITER, BodyWriter
from nibble.service.gateway.usage import Usage

logger = logging.getLogger(__name__)

T = TypeVar("T")
_JSON = "application/json"
_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the events
}


class ClientGone(Cancelled):
    """Never sent: there is nobody to send it to."""

    code = "client_disconnected"


class _GenerationResponse(Response):
    """Base of both: the generation is closed exactly once, before the end is written."""

    def __init__(self, generation: Generation, headers: Mapping[str, str]) -> None:
        super().__init__()
        self._generation = generation
        self._extra_headers = headers

    async def _send_error(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, ClientGone):
            headers = {**self._extra_headers, **error.headers}
            await Response(error.body(), error.status, headers, _JSON)(scope, receive, send)

    async def _concluded(self, work: Coroutine[Any, Any, T], watcher: Coroutine[Any, Any, None]) -> T | ApiError:
        """Run the work until it ends, the client is gone or the generation is interrupted; close the generation."""
        error: ApiError | None = None
        try:
            result = await _until_interrupted(work, watcher, self._generation)
        except ApiError as raised:
            error = raised
        except asyncio.CancelledError:
            error = ServerFault("the gateway was stopped")
            raise
        except Exception:  # the ASGI boundary: only here can an answer that has begun be ended properly
            logger.exception("request_id=%s failed", self._generation.plan.request_id)
            error = ServerFault("internal error; the log of the gateway has its cause")
        finally:
            await self._generation.close(error)
        return result if error is None else error


class CompletionResponse(_GenerationResponse):
    """The whole answer in one JSON body, which `fold` makes."""

    def __init__(
        self, generation: Generation, fold: Callable[[], Coroutine[Any, Any, bytes]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(generation, headers)
        self._fold = fold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = await self._concluded(self._fold(), _until_disconnect(receive))
        if isinstance(outcome, ApiError):
            await self._send_error(outcome, scope, receive, send)
        else:
            await Response(outcome, 200, self._extra_headers, _JSON)(scope, receive, send)


class StreamEncoder(Protocol):
    """An answer as server-sent events."""

    def opening(self) -> bytes: ...

    def delta(self, delta: Delta) -> bytes: ...

    def closing(self, usage: Usage) -> bytes: ...

    def failure(self, error: ApiError, usage: Usage) -> bytes: ...


class StreamResponse(_GenerationResponse):
    """Server-sent events, with a comment after each keep_alive_s of silence.

    before_end: awaited when the client has everything but the end.
    """

    def __init__(
        self,
        generation: Generation,
        encoder: StreamEncoder,
        headers: Mapping[str, str],
        keep_alive_s: float,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(generation, headers)
        self._encoder = encoder
        self._before_end = before_end
        self.raw_headers = [(name.encode(), value.encode()) for name, value in {**_SSE_HEADERS, **headers}.items()]
        self._keep_alive_s = keep_alive_s
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = _Writer(self._generation, self._encoder, scope.get(SERVER_SEND, send), scope.get(BODY_WRITER))
        outcome = await self._concluded(self._stream(send, writer), self._keep_alive(receive, writer))
        if isinstance(outcome, ApiError) and not self._is_started:
            await self._send_error(outcome, scope, receive, send)
            return
        end = outcome
        if isinstance(end, ApiError):
            end = self._encoder.failure(end, self._generation.usage())
        if self._before_end is not None:
            await self._before_end()
        if not isinstance(outcome, ClientGone):
            await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _stream(self, send: Send, writer: _Writer) -> bytes:
        """Send all but the last bytes, which are returned."""
        generation, encoder = self._generation, self._encoder
        self._is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await writer.send(encoder.opening())
        try:
            await generation.run(writer.write)
            await writer.drained()
        finally:
            writer.stop()
        return encoder.closing(generation.usage())

    async def _keep_alive(self, receive: Receive, writer: _Writer) -> None:
        """Return when the client is gone. A comment falls between two events: each of those is sent whole."""
        while True:
            due_s = writer.last_sent_s + self._keep_alive_s - time.monotonic()
            try:
                await asyncio.wait_for(_until_disconnect(receive), max(due_s, 0))
                return
            except TimeoutError:
                pass
            if self._is_started and time.monotonic() >= writer.last_sent_s + self._keep_alive_s:
                await writer.send(KEEP_ALIVE)


class _Writer:
    """Writes deltas to the client in the very call that tells of them, without a task to be woken for it.

    `send` mostly does all it has to before it waits for anything, so its coroutine is begun by hand. It waits where the
    client reads more slowly than is written; only then there is a task for the rest, and the generation pauses. Where
    there is a body_writer, `send` is only used for what that one does not take.
    """

    __slots__ = ("_body_writer", "_encoder", "_generation", "_send", "_task", "_waiting", "last_sent_s")

    def __init__(
        self, generation: Generation, encoder: StreamEncoder, send: Send, body_writer: BodyWriter | None
    ) -> None:
        self._generation = generation
        self._encoder = encoder
        self._send = cast(Callable[[Message], Coroutine[Any, None, None]], send)
        self._body_writer = body_writer
        self._waiting: deque[bytes] = deque()
        self._task: asyncio.Task[None] | None = None
        self.last_sent_s = time.monotonic()

    async def send(self, part: bytes) -> None:
        """What is no delta: the opening, which may be empty, or a comment."""
        if part:
            await self._send(_body(part))
        self.last_sent_s = time.monotonic()

    def write(self, delta: Delta) -> None:
        part = self._encoder.delta(delta)
        if not part:
            return
        self.last_sent_s = time.monotonic()
        if self._task is not None:
            self._waiting.append(part)
        elif self._body_writer is None or not self._body_writer.write(part):
            self._begin_to_send(part)

    def _begin_to_send(self, part: bytes) -> None:
        sending = self._send(_body(part))
        try:
            obstacle = sending.send(None)
        except StopIteration:
            return
        self._generation.pause()
        self._task = asyncio.create_task(self._go_on(sending, obstacle))

    async def drained(self) -> None:
        """All is written. Raises what a write raised."""
        while self._task is not None:
            await self._task

    def stop(self) -> None:
        """Nothing more is written."""
        if self._task is not None:
            self._task.cancel()

    async def _go_on(self, sending: Coroutine[Any, None, None], obstacle: Any) -> None:
        await _rest(sending, obstacle)
        while self._waiting:
            await self._send(_body(self._waiting.popleft()))
        self._task = None
        self._generation.resume()


def _body(part: bytes) -> Message:
    return {"type": "http.response.body", "body": part, "more_body": True}


@types.coroutine
def _rest(begun: Coroutine[Any, None, None], obstacle: Any) -> Generator[Any, None, None]:
    """Wait for the future that a coroutine begun by hand waits for, then go on with it as a task would have."""
    yield obstacle
    yield from begun


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_interrupted(
    work: Coroutine[Any, Any, T], watcher: Coroutine[Any, Any, None], generation: Generation
) -> T:
    """Return what the work returns. Raises what it raises, what it was interrupted with, or ClientGone."""
    task, watching, interrupted = asyncio.create_task(work), asyncio.create_task(watcher), generation.interrupted
    try:
        await asyncio.wait((task, watching, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and generation.outlives_client:  # what it sends from now on goes nowhere
            watching.result()
            await asyncio.wait((task, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if interrupted.done():
            raise interrupted.result()
        watching.result()
        raise ClientGone("the client closed the connection")
    finally:
        task.cancel()
        watching.cancel()
        await asyncio.gather(task, watching, return_exceptions=True)
