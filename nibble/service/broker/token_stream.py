"""The mailbox of one request's tokens in a gateway: filled by the reader of live events and by reads of the token
log, emptied whole by the request's handler. Offers are idempotent: what is known already is trimmed, and what would
leave a gap is refused, so the order in which the two sources arrive does not matter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics, TokenEvent
from nibble.service.broker.terms import Level, Terms
from nibble.service.broker.token_log import TokenLog

NEVER_S = float("-inf")


class TokenStream:
    """A request's TokenEvents from `from_index` on: contiguous, ending with the final one, for one consumer.

    `take` has what is new, all of it as one event; `on_event` is called with the stream when there is something to
    take. That is the cheap way, without a task to be woken for each token. The other one is async iteration, which may
    be cancelled (a timeout) without loss.
    """

    __slots__ = (
        "_alone",
        "_final",
        "_is_over",
        "_metrics",
        "_num_taken",
        "heard_s",
        "log",
        "num_restores",
        "on_close",
        "on_event",
        "quota_levels",
        "request",
        "request_id",
        "terms",
    )

    def __init__(self, request_id: str, from_index: int = 0) -> None:
        self.request_id = request_id
        self.request: GenerationRequest | None = None  # until Redis is known to have it
        self.terms = Terms()  # of an attached stream the context alone
        self.quota_levels: tuple[Level, ...] = ()  # when it was submitted
        self.log = TokenLog()  # all that is known, delivered or not: what a restarted Redis is given back
        self.heard_s = time.monotonic()  # kept by the table; NEVER_S asks for a read of the log now
        self.num_restores = 0
        self.on_close: Callable[[TokenStream], None] | None = None
        self.on_event: Callable[[TokenStream], None] | None = None
        self._num_taken = from_index
        self._alone: TokenEvent | None = None  # the event to be taken, where what waits is just that of one
        self._metrics: RequestMetrics | None = None  # the newest
        self._final: TokenEvent | None = None
        self._is_over = False  # the final event was taken, or the stream was closed

    @property
    def is_complete(self) -> bool:
        """The final event is here, taken or not."""
        return self._final is not None

    def offer(self, event: TokenEvent) -> bool:
        """Take what is new in an event. False if tokens before it are missing: the log must be read."""
        if self._final is not None:
            return True
        num_known = len(self.log.token_ids)
        if event.index > num_known:
            self.heard_s = NEVER_S
            return False
        is_alone = event.index == num_known == self._num_taken and event.token_ids and event.prompt_logprobs is None
        self._alone = event if is_alone else None
        self.log.append(event)
        if event.metrics is not None:
            self._metrics = event.metrics
        if event.finish_reason is not None:
            self._final = event
        return True

    def fail(self, message: str) -> None:
        """End the stream with an error of this gateway's own."""
        self.offer(
            TokenEvent(
                request_id=self.request_id,
                index=len(self.log.token_ids),
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=message,
            )
        )
        self.tell()

    def close(self) -> None:
        """Stop listening. The request itself goes on unless it is aborted."""
        self._is_over, self._alone = True, None
        if self.on_close is not None:
            self.on_close(self)
        self.tell()

    def tell(self) -> None:
        """Let the consumer know of what was offered."""
        if self.on_event is not None:
            self.on_event(self)

    def take(self) -> TokenEvent | None:
        """What is new since the last time; None if nothing is."""
        event, self._alone = self._alone, None
        if event is None:
            if self._is_over or (self._final is None and len(self.log.token_ids) <= self._num_taken):
                return None
            event = self._all_waiting()
        self._num_taken += len(event.token_ids)
        self._is_over = event.finish_reason is not None
        return event

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        is_told = asyncio.Event()
        self.on_event = lambda _: is_told.set()
        while not self._is_over:
            if (event := self.take()) is not None:
                return event
            await is_told.wait()
            is_told.clear()
        raise StopAsyncIteration

    def _all_waiting(self) -> TokenEvent:
        log, final = self.log, self._final
        self._num_taken = index = min(self._num_taken, len(log.token_ids))  # from_index may be past the end
        return TokenEvent(
            request_id=self.request_id,
            index=index,
            token_ids=log.token_ids[index:],
            finish_reason=None if final is None else final.finish_reason,
            error=None if final is None else final.error,
            error_fields=() if final is None else final.error_fields,
            metrics=self._metrics,
            logprobs=log.logprobs_from(index) if log.logprobs else None,
            prompt_logprobs=log.prompt_logprobs if index == 0 else None,
        )
