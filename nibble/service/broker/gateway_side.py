"""The broker as a gateway sees it: submit a request, follow its tokens, abort it. asyncio.

Two tasks run per process. The reader dispatches published messages (one per engine step and gateway) to the streams'
mailboxes. The checker reads the token logs of the streams that heard nothing for a while or missed something, many in
one call, and does what cannot wait for a caller: it gives requests back to a Redis that lost them, ends streams that
nobody will serve, and repeats aborts that did not get through. Live events may thus be lost without harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from typing import Any, cast

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.exceptions import NoScriptError, RedisError

from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from nibble.service.broker import scripts
from nibble.service.broker.errors import (
    BrokerError,
    BrokerUnavailable,
    DuplicateRequest,
    NoWorker,
    QueueFull,
    UnknownRequest,
    translated,
)
from nibble.service.broker.keys import Keys
from nibble.service.broker.stream_table import StreamTable
from nibble.service.broker.token_stream import TokenStream
from nibble.service.broker.wire import (
    BrokerStatus,
    decode_event,
    decode_request,
    decode_worker_info,
    encode,
    pack_tokens,
    unpack_tokens,
)

logger = logging.getLogger(__name__)

MAX_PRIORITY = 4095  # scores of the queue stay exact (scripts/submit.lua)
_CALL_TIMEOUT_S = 2.0
_READS_PER_CALL = 200  # keeps each call to the server short
_PING_AFTER_S = 5.0  # a subscription this silent is asked whether it lives
_RECONNECT_S = 0.1
_ATTEMPTS_PER_RESTORE = 1 << 20  # attempts of a restored request begin above all earlier ones


class GatewayBroker:
    """One gateway process's connection.

    gateway_id: unique per process, without ',' and '#'. needs_worker: refuse with NoWorker while no worker is alive;
    False for a deployment that scales from zero. no_worker_timeout_s: a request ends with an error when no worker was
    alive for so long (None: its deadline alone counts). give_up_s: streams end with an error when Redis was not
    reachable for so long. max_attempts: a request that so many workers died with is given up. log_ttl_s: how long a
    finished request can still be attached to.
    """

    def __init__(
        self,
        url: str,
        gateway_id: str,
        *,
        namespace: str = "nibble",
        max_queued: int = 1024,
        needs_worker: bool = True,
        no_worker_timeout_s: float | None = 120.0,
        give_up_s: float = 60.0,
        silence_s: float = 1.5,
        max_attempts: int = 3,
        log_ttl_s: float = 600.0,
    ) -> None:
        if not gateway_id or "," in gateway_id:
            raise ValueError(f"gateway_id {gateway_id!r} is empty or has a comma")
        self._keys = Keys(namespace)
        self._gateway_id = gateway_id
        self._max_queued = max_queued
        self._needs_worker = needs_worker
        self._no_worker_timeout_s = no_worker_timeout_s
        self._give_up_s = give_up_s
        self._silence_s = silence_s
        self._max_attempts = max_attempts
        self._log_ttl_ms = max(1, round(log_ttl_s * 1000))
        self._client = redis.asyncio.Redis.from_url(url, **scripts.client_options(Retry, _CALL_TIMEOUT_S))
        self._streams = StreamTable()
        self._pending_aborts: dict[str, tuple[FinishReason, str]] = {}
        self._is_subscribed = asyncio.Event()
        self._must_check = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._unreachable_since_s: float | None = None
        self._no_worker_since_s: float | None = None

    async def start(self) -> None:
        """Start the reader and the checker. Does not raise if Redis is not there yet: calls will."""
        self._tasks = [asyncio.create_task(self._read_events()), asyncio.create_task(self._check_streams())]
        try:
            await asyncio.wait_for(self._is_subscribed.wait(), _CALL_TIMEOUT_S)
        except TimeoutError:
            logger.warning("broker not reachable yet gateway_id=%s", self._gateway_id)

    async def close(self) -> None:
        """Stop. Streams still open end with an error event; their requests go on and can be attached to elsewhere."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._streams.fail(self._streams, "the gateway is shutting down")
        await self._client.aclose()

    async def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request. Raises QueueFull, NoWorker, DuplicateRequest, BrokerUnavailable (within 2 s)."""
        if request.request_id in self._streams:
            raise DuplicateRequest(request.request_id)
        self._pending_aborts.pop(request.request_id, None)
        stream = TokenStream(request.request_id)
        self._streams.add(stream)  # before the call: its first events may come before the reply
        try:
            reply = await self._submit(request, nonce=secrets.token_hex(8))
        except BaseException as error:
            self._streams.remove(stream)
            if isinstance(error, BrokerUnavailable | asyncio.CancelledError):  # it may have been queued
                self._pending_aborts[request.request_id] = (FinishReason.ABORT, "")
            raise
        if reply[0] != b"ok":
            self._streams.remove(stream)
            raise self._refusal(request.request_id, reply)
        stream.request = request
        return stream

    async def attach(self, request_id: str, from_index: int = 0) -> TokenStream:
        """Follow a request, running or finished not long ago. Raises UnknownRequest, BrokerUnavailable."""
        stream = TokenStream(request_id, from_index)
        self._streams.add(stream)
        try:
            _, entries = await self._call(scripts.READ, self._gateway_id, 1, request_id, 0)
        except BaseException:
            self._streams.remove(stream)
            raise
        if not entries[0]:
            self._streams.remove(stream)
            raise UnknownRequest(request_id)
        stream.request = decode_request(entries[0][3])
        self._streams.offer(_logged_event(request_id, 0, entries[0]))
        return stream

    async def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request with this reason; its streams get the final event. Nothing happens if it has ended.

        Does not raise if Redis is not reachable: the abort is repeated until it gets through.
        """
        try:
            await self._call(scripts.ABORT, request_id, reason.value, "")
        except BrokerUnavailable:
            self._pending_aborts[request_id] = (reason, "")
        except asyncio.CancelledError:
            self._pending_aborts[request_id] = (reason, "")
            raise

    async def status(self) -> BrokerStatus:
        """Queue, leases and live workers of the deployment. Raises BrokerUnavailable."""
        num_queued, num_running, infos = await self._call(scripts.STATUS)
        workers = tuple(decode_worker_info(info) for info in infos)
        return BrokerStatus(num_queued=num_queued, num_running=num_running, workers=workers)

    def _refusal(self, request_id: str, reply: list[Any]) -> BrokerError:
        if reply[0] == b"queue_full":
            return QueueFull(reply[1], self._max_queued, reply[2] / 1000)
        if reply[0] == b"no_worker":
            return NoWorker(reply[2] / 1000)
        return DuplicateRequest(request_id)

    async def _submit(
        self, request: GenerationRequest, nonce: str, attempt: int | str = "", tokens: bytes = b""
    ) -> list[Any]:
        if abs(request.priority) > MAX_PRIORITY:
            raise ValueError(f"priority {request.priority} is not within ±{MAX_PRIORITY}")
        deadline_ms = "" if request.deadline_s is None else round(request.deadline_s * 1000)
        reply: list[Any] = await self._call(
            scripts.SUBMIT,
            request.request_id,
            encode(request),
            self._gateway_id,
            nonce,
            request.priority,
            deadline_ms,
            self._log_ttl_ms,
            self._max_attempts,
            self._max_queued,
            int(self._needs_worker),
            attempt,
            tokens,
        )
        return reply

    async def _call(self, script: scripts.Script, *arguments: str | bytes | int) -> Any:
        root, client = self._keys.root, cast(Any, self._client)
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                try:
                    return await client.execute_command("EVALSHA", script.sha, 1, root, *arguments)
                except NoScriptError:
                    return await client.execute_command("EVAL", script.source, 1, root, *arguments)
        except (RedisError, OSError) as error:
            raise translated(error) from error

    # The reader

    async def _read_events(self) -> None:
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await self._follow(pubsub)
            except (RedisError, OSError) as error:
                logger.warning("subscription lost gateway_id=%s: %s", self._gateway_id, error)
            self._is_subscribed.clear()
            await asyncio.sleep(_RECONNECT_S)

    async def _follow(self, pubsub: Any) -> None:
        await pubsub.subscribe(self._keys.events(self._gateway_id))
        is_asked = False
        while True:
            message = await pubsub.get_message(timeout=_PING_AFTER_S)
            if message is None:
                if is_asked:
                    raise TimeoutError("the server does not answer")
                await pubsub.ping()
            elif message["type"] == "message":
                if not self._streams.dispatch(message["data"]):
                    self._must_check.set()
            elif message["type"] == "subscribe":
                self._is_subscribed.set()
                self._streams.mark_all_silent()
                self._must_check.set()
            is_asked = message is None

    # The checker

    async def _check_streams(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._must_check.wait(), self._silence_s / 3)
            self._must_check.clear()
            try:
                await self._repeat_aborts()
                await self._read_silent_streams()
                self._unreachable_since_s = None
            except BrokerUnavailable as error:
                self._note_unreachable(error)
                await asyncio.sleep(_RECONNECT_S)

    async def _repeat_aborts(self) -> None:
        for request_id, (reason, message) in list(self._pending_aborts.items()):
            await self._call(scripts.ABORT, request_id, reason.value, message)
            del self._pending_aborts[request_id]

    async def _read_silent_streams(self) -> None:
        silent = self._streams.silent(self._silence_s)
        if not silent:
            self._no_worker_since_s = None
        for first in range(0, len(silent), _READS_PER_CALL):
            await self._read_logs(silent[first : first + _READS_PER_CALL])

    async def _read_logs(self, request_ids: list[str]) -> None:
        first_missing = {name: min(len(s.token_ids) for s in self._streams.of(name)) for name in request_ids}
        arguments = [argument for pair in first_missing.items() for argument in pair]
        num_workers, entries = await self._call(scripts.READ, self._gateway_id, 0, *arguments)
        for (request_id, index), entry in zip(first_missing.items(), entries, strict=True):
            if entry:
                self._streams.offer(_logged_event(request_id, index, entry))
            else:
                await self._restore(request_id)
        await self._note_num_workers(num_workers, request_ids)

    async def _restore(self, request_id: str) -> None:
        """Give a request back to a server that lost it, with the tokens so far, above all its old attempts."""
        streams = self._streams.of(request_id)
        if not streams:
            return  # it has ended meanwhile
        longest = max(streams, key=lambda stream: len(stream.token_ids))
        if longest.request is None:
            return  # submit() or attach() is under way and will find out
        longest.num_restores += 1
        attempt = longest.num_restores * _ATTEMPTS_PER_RESTORE
        await self._submit(longest.request, secrets.token_hex(8), attempt, pack_tokens(longest.token_ids))
        logger.warning("request restored request_id=%s num_tokens=%d", request_id, len(longest.token_ids))

    async def _note_num_workers(self, num_workers: int, request_ids: list[str]) -> None:
        now_s = time.monotonic()
        if num_workers or self._no_worker_timeout_s is None:
            self._no_worker_since_s = None
        elif self._no_worker_since_s is None:
            self._no_worker_since_s = now_s
        elif now_s - self._no_worker_since_s > self._no_worker_timeout_s:
            message = f"no worker was available for {self._no_worker_timeout_s:.0f} s"
            for request_id in request_ids:
                await self._call(scripts.ABORT, request_id, FinishReason.ERROR.value, message)

    def _note_unreachable(self, error: BrokerUnavailable) -> None:
        now_s = time.monotonic()
        if self._unreachable_since_s is None:
            self._unreachable_since_s = now_s
            logger.warning("broker not reachable gateway_id=%s: %s", self._gateway_id, error)
        if now_s - self._unreachable_since_s > self._give_up_s:
            message = f"the broker was not reachable for {self._give_up_s:.0f} s"
            for stream in self._streams:
                self._pending_aborts[stream.request_id] = (FinishReason.ERROR, message)
            self._streams.fail(self._streams, message)


def _logged_event(request_id: str, index: int, entry: list[Any]) -> TokenEvent:
    """An entry of scripts/read.lua as an event: the log's tokens from index on, and how the request ended."""
    token_ids = unpack_tokens(entry[0])
    if not entry[1]:
        return TokenEvent(request_id=request_id, index=index, token_ids=token_ids)
    final = decode_event(entry[1])
    return TokenEvent(
        request_id=request_id,
        index=index,
        token_ids=token_ids,
        finish_reason=final.finish_reason,
        error=final.error,
        metrics=final.metrics,
    )
