"""Makes a gateway's streams end right whatever gets lost: the slow road beside the live events.

Every silence_s / 3, or when asked to, it reads the token logs of the streams that heard nothing for silence_s or
missed something, many in one call. A log that is gone means that Redis lost its memory: the request is given back to
it with the tokens so far. Streams whom nobody can serve (no Redis, no worker) end with an error after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from nibble.engine.protocol import FinishReason
from nibble.service.broker.errors import BrokerUnavailable
from nibble.service.broker.gateway_calls import GatewayCalls
from nibble.service.broker.stream_table import StreamTable
from nibble.service.broker.token_stream import NEVER_S

logger = logging.getLogger(__name__)

_READS_PER_CALL = 200  # keeps each call to the server short
_RETRY_S = 0.1
_STALE_AFTER_SILENCES = 4  # reads of a silent stream are about one silence apart


@dataclass(frozen=True)
class Patience:
    """See GatewayBroker."""

    silence_s: float
    give_up_s: float
    no_worker_timeout_s: float | None


@dataclass
class PendingAbort:
    """An abort to be repeated until it got through num_calls times, or ended the request.

    Twice for a submit without a reply: the server may read it from its socket after the first abort.
    """

    reason: FinishReason
    error: str = ""
    num_calls: int = 1


class StreamChecker:
    """`run` is a task of its own; `check_soon` and `pending_aborts` are how others hand it work."""

    def __init__(self, calls: GatewayCalls, streams: StreamTable, patience: Patience) -> None:
        self._calls = calls
        self._streams = streams
        self._patience = patience
        self._is_asked = asyncio.Event()
        self._unreachable_since_s: float | None = None
        self._no_worker_seen_s = NEVER_S  # last read that found none
        self._no_worker_since_s = NEVER_S  # the first of these reads in a row
        self.pending_aborts: dict[str, PendingAbort] = {}
        self.num_restored = 0  # requests

    def check_soon(self) -> None:
        self._is_asked.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience.silence_s / 3):  # wait_for may swallow a cancellation
                    await self._is_asked.wait()
            self._is_asked.clear()
            try:
                await self._repeat_aborts()
                await self._read_silent()
                self._unreachable_since_s = None
            except BrokerUnavailable as error:
                self._note_unreachable(error)
                await asyncio.sleep(_RETRY_S)

    async def _repeat_aborts(self) -> None:
        for request_id, pending in list(self.pending_aborts.items()):
            has_ended_it = await self._calls.abort(request_id, pending.reason, pending.error)
            pending.num_calls -= 1
            if (has_ended_it or pending.num_calls == 0) and self.pending_aborts.get(request_id) is pending:
                del self.pending_aborts[request_id]

    async def _read_silent(self) -> None:
        silent = self._streams.silent(self._patience.silence_s)
        for first in range(0, len(silent), _READS_PER_CALL):
            await self._read_logs(silent[first : first + _READS_PER_CALL])

    async def _read_logs(self, request_ids: list[str]) -> None:
        # A stream may have ended while an earlier part of the silent ones was read.
        streams = {name: self._streams.of(name) for name in request_ids if name in self._streams}
        if not streams:
            return
        first_indexes = {name: min(len(stream.log.token_ids) for stream in streams[name]) for name in streams}
        num_workers, reads = await self._calls.read(first_indexes, with_request=False)
        for request_id, read in zip(first_indexes, reads, strict=True):
            if read is not None:
                self._streams.offer(read.event)
            else:
                await self._restore(request_id)
        await self._note_num_workers(num_workers, list(streams))

    async def _restore(self, request_id: str) -> None:
        streams = self._streams.of(request_id)
        if not streams:
            return  # it has ended meanwhile
        longest = max(streams, key=lambda stream: len(stream.log.token_ids))
        if longest.request is None:
            return  # submit() or attach() is under way and will find out
        longest.num_restores += 1
        self.num_restored += 1
        await self._calls.restore(longest.request, longest.log, longest.num_restores, longest.terms)
        logger.warning("request restored request_id=%s num_tokens=%d", request_id, len(longest.log.token_ids))

    async def _note_num_workers(self, num_workers: int, request_ids: list[str]) -> None:
        timeout_s, now_s = self._patience.no_worker_timeout_s, time.monotonic()
        seen_before_s, self._no_worker_seen_s = self._no_worker_seen_s, now_s
        if num_workers or timeout_s is None:
            self._no_worker_seen_s = NEVER_S
        elif now_s - seen_before_s > _STALE_AFTER_SILENCES * self._patience.silence_s:
            self._no_worker_since_s = now_s  # not seen lately, so streams were heard in between
        elif now_s - self._no_worker_since_s > timeout_s:
            for request_id in request_ids:
                error = f"no worker was available for {timeout_s:g} s"
                await self._calls.abort(request_id, FinishReason.ERROR, error)

    def _note_unreachable(self, error: BrokerUnavailable) -> None:
        now_s = time.monotonic()
        if self._unreachable_since_s is None:
            self._unreachable_since_s = now_s
            logger.warning("broker not reachable: %s", error)
        if now_s - self._unreachable_since_s > self._patience.give_up_s:
            message = f"the broker was not reachable for {self._patience.give_up_s:g} s"
            for stream in self._streams:
                self.pending_aborts[stream.request_id] = PendingAbort(FinishReason.ERROR, message)
            self._streams.fail(self._streams, message)
