"""The mailbox of one request's tokens in a gateway: filled by the reader of live events and by reads of the token
log, drained whole by the request's handler. Offers are idempotent: what is known already is trimmed, and what would
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
    """Async iterator of a request's TokenEvents from `from_index` on: contiguous, ending with the final one.

    Waiting events are coalesced into one. For one consumer; waiting for it may be cancelled (a timeout) without loss.
    """

    def __init__(self, request_id: str, from_index: int = 0) -> None:
        self.request_id = request_id
        self.request: GenerationRequest | None = None  # until Redis is known to have it
        self.terms = Terms()  # of an attached stream the context alone
        self.quota_levels: tuple[Level, ...] = ()  # when it was submitted
        self.log = TokenLog()  # all that is known, delivered or not: what a restarted Redis is given back
        self.heard_s = time.monotonic()  # NEVER_S asks for a read of the log now
        self.num_restores = 0
        self.on_close: Callable[[TokenStream], None] | None = None
        self._num_delivered = from_index
        self._metrics: RequestMetrics | None = None  # the newest
        self._final: TokenEvent | None = None
        self._is_over = False  # the final event was delivered, or the stream was closed
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_complete(self) -> bool:
        """The final event is here, delivered or not."""
        return self._final is not None

    def offer(self, event: TokenEvent) -> bool:
        """Take what is new in an event. False if tokens before it are missing: the log must be read."""
        if self._final is not None:
            return True
        if event.index > len(self.log.token_ids):
            self.heard_s = NEVER_S
            return False
        self.heard_s = time.monotonic()
        self.log.append(event)
        if event.metrics is not None:
            self._metrics = event.metrics
        if event.finish_reason is not None:
            self._final = event
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
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

    def close(self) -> None:
        """Stop listening. The request itself goes on unless it is aborted."""
        self._is_over = True
        if self.on_close is not None:
            self.on_close(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._is_over:
            if self._final is not None or len(self.log.token_ids) > self._num_delivered:
                return self._drain()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        raise StopAsyncIteration

    def _drain(self) -> TokenEvent:
        log, final = self.log, self._final
        index = min(self._num_delivered, len(log.token_ids))  # from_index may be past the end
        waiting = log.token_ids[index:]
        self._num_delivered = index + len(waiting)
        self._is_over = final is not None
        return TokenEvent(
            request_id=self.request_id,
            index=index,
            token_ids=waiting,
            finish_reason=None if final is None else final.finish_reason,
            error=None if final is None else final.error,
            metrics=self._metrics,
            logprobs=log.logprobs_from(index) if log.logprobs else None,
            prompt_logprobs=log.prompt_logprobs if index == 0 else None,
        )
