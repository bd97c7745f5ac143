"""The broker as a gateway sees it: submit a request, follow its tokens, abort it. asyncio.

One task dispatches the published messages (one per engine step and gateway) to the streams' mailboxes; they may get
lost without harm, since a second one (stream_checker.py) compares with the token logs.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from nibble.engine.protocol import FinishReason, GenerationRequest
from nibble.service.broker.errors import BrokerUnavailable, DuplicateRequest, UnknownRequest
from nibble.service.broker.gateway_calls import CALL_TIMEOUT_S, GatewayCalls, SubmitPolicy
from nibble.service.broker.stream_checker import Patience, PendingAbort, StreamChecker
from nibble.service.broker.stream_table import StreamTable
from nibble.service.broker.terms import Terms
from nibble.service.broker.token_stream import TokenStream
from nibble.service.broker.wire import BrokerStatus, ServerStatus

logger = logging.getLogger(__name__)

_PING_AFTER_S = 5.0  # a subscription this silent is asked whether it lives
_RECONNECT_S = 0.1
NO_TERMS = Terms()
DELETED_RESPONSE = b"deleted"


class GatewayBroker:
    """One gateway process's connection.

    gateway_id: unique per process, without a comma. needs_worker: refuse with NoWorker while no worker is alive; False
    for a deployment that scales from zero. no_worker_timeout_s: a request ends with an error when no worker was alive
    for so long (None: its deadline alone counts). give_up_s: streams end with an error when Redis was not reachable
    for so long. silence_s: a stream that hears nothing for so long reads its log. max_attempts: a request that so
    many workers died with is given up. log_ttl_s: how long a finished request can still be attached to.
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
        self._gateway_id = gateway_id
        self._calls = GatewayCalls(
            url, gateway_id, namespace, SubmitPolicy(max_queued, needs_worker, max_attempts, log_ttl_s)
        )
        self._streams = StreamTable()
        self._checker = StreamChecker(self._calls, self._streams, Patience(silence_s, give_up_s, no_worker_timeout_s))
        self._is_subscribed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the tasks. Does not raise if Redis is not there yet: calls will."""
        self._tasks = [asyncio.create_task(self._read_events()), asyncio.create_task(self._checker.run())]
        try:
            await asyncio.wait_for(self._is_subscribed.wait(), CALL_TIMEOUT_S)
        except TimeoutError:
            logger.warning("broker not reachable yet gateway_id=%s", self._gateway_id)

    async def close(self) -> None:
        """Stop. Streams still open end with an error event; their requests go on and can be attached to elsewhere."""
        running = set(self._tasks)
        while running:  # once is not enough: redis-py's reads may swallow a cancellation that meets a message
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=_RECONNECT_S)
        self._streams.fail(self._streams, "the gateway is shutting down")
        await self._calls.close()

    async def submit(self, request: GenerationRequest, terms: Terms = NO_TERMS) -> TokenStream:
        """Queue a request.

        Raises QueueFull, NoWorker, OverQuota, AlreadyClaimed, DuplicateRequest, BrokerUnavailable (within 2 s).
        """
        request_id = request.request_id
        if request_id in self._streams:
            raise DuplicateRequest(request_id)
        self._checker.pending_aborts.pop(request_id, None)
        stream = TokenStream(request_id)
        self._streams.add(stream)  # before the call: its first events may come before the reply
        try:
            stream.quota_levels = await self._calls.submit(request, secrets.token_hex(8), terms)
        except BaseException as error:
            self._streams.remove(stream)
            if isinstance(error, BrokerUnavailable | asyncio.CancelledError):  # it may have been queued
                self._checker.pending_aborts[request_id] = PendingAbort(FinishReason.ABORT, num_calls=2)
            raise
        stream.request, stream.terms = request, terms
        return stream

    async def attach(self, request_id: str, from_index: int = 0) -> TokenStream:
        """Follow a request, running or finished not long ago. Raises UnknownRequest, BrokerUnavailable."""
        stream = TokenStream(request_id, from_index)
        self._streams.add(stream)
        try:
            _, (read,) = await self._calls.read({request_id: 0}, with_request=True)
            if read is None:
                raise UnknownRequest(request_id)
        except BaseException:
            self._streams.remove(stream)
            raise
        stream.request, stream.terms = read.request, Terms(context=read.context)
        self._streams.offer(read.event)
        return stream

    async def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request with this reason; its streams get the final event. Nothing happens if it has ended.

        Does not raise if Redis is not reachable: the abort is repeated until it gets through.
        """
        try:
            await self._calls.abort(request_id, reason, "")
        except (BrokerUnavailable, asyncio.CancelledError) as error:
            self._checker.pending_aborts[request_id] = PendingAbort(reason)
            if isinstance(error, asyncio.CancelledError):
                raise

    async def store_response(self, response_id: str, record: bytes, previous_id: str, ttl_s: float) -> None:
        """Keep a record for ttl_s, and all those that it goes on from. Raises BrokerUnavailable."""
        await self._calls.store_response(response_id, record, previous_id, ttl_s)

    async def read_responses(self, response_id: str, limit: int) -> list[bytes]:
        """A record and those before it, newest first, at most `limit`. The last one is empty if it is not known, and
        DELETED_RESPONSE if it was deleted.

        Raises BrokerUnavailable.
        """
        return await self._calls.read_responses(response_id, limit)

    async def delete_response(self, response_id: str, ttl_s: float) -> None:
        """For ttl_s it cannot be stored again either. Raises BrokerUnavailable."""
        await self._calls.delete_response(response_id, ttl_s)

    async def status(self) -> BrokerStatus:
        """Queue, leases and live workers of the deployment. Raises BrokerUnavailable."""
        return await self._calls.status()

    async def server_status(self) -> ServerStatus:
        """Raises BrokerError: a server need not allow the question."""
        return await self._calls.server_status()

    @property
    def num_restored(self) -> int:
        """Requests given back to a server that had lost them."""
        return self._checker.num_restored

    async def _read_events(self) -> None:
        while True:
            try:
                async with self._calls.pubsub() as pubsub:
                    await self._follow(pubsub)
            except (RedisError, OSError) as error:
                logger.warning("subscription lost gateway_id=%s: %s", self._gateway_id, error)
            self._is_subscribed.clear()
            await asyncio.sleep(_RECONNECT_S)

    async def _follow(self, pubsub: PubSub) -> None:
        await pubsub.subscribe(self._calls.channel)
        is_asked = False
        while True:
            message = await pubsub.get_message(timeout=_PING_AFTER_S)
            if message is None:
                if is_asked:
                    raise TimeoutError("the server does not answer")
                await pubsub.ping()
            elif message["type"] == "message":
                if not self._streams.dispatch(message["data"]):
                    self._checker.check_soon()
            elif message["type"] == "subscribe":
                self._is_subscribed.set()
                self._streams.mark_all_silent()
                self._checker.check_soon()
            is_asked = message is None
