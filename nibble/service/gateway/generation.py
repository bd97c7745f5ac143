"""One client request in flight: its choices' token streams, merged into one sequence of deltas.

Both kinds of answer are made of these deltas: `completion.py` encodes each, or folds them all. Whatever happens,
`close` is called once: it aborts what still runs, so that no worker generates for nobody. A generation that was not
started but is followed (`follow.py`) belongs to somebody else: nothing is aborted, and nothing counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.errors import AlreadyClaimed, BrokerError
from nibble.service.broker.terms import Level, Terms
from nibble.service.broker.token_stream import TokenStream
from nibble.service.gateway.answer_parser import Parts
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.errors import ApiError, Cancelled, DeadlineExceeded, ServerFault, from_broker
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.metrics import Ended, Outcome
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.regroup import singly
from nibble.service.gateway.tool_call_parser import CallDelta
from nibble.service.gateway.usage import Usage

logger = logging.getLogger(__name__)


class Delta(NamedTuple):
    """What is new of one choice; finish_reason on its last delta alone. num_tokens: of this choice so far.

    logprobs: of the tokens that begin in what was generated, if they were asked for. text: the content alone.
    """

    choice: int
    text: str
    finish_reason: str | None
    num_tokens: int
    logprobs: Sequence[TokenLogprob] = ()
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()


class Generation:
    """Made by `start` or `follow`. When `interrupted` is set, the client is told that error and `deltas` is left.

    outlives_client: it goes on when its client leaves, who may come back for it.
    """

    def __init__(self, plan: Plan, gateway: Gateway, *, is_owner: bool = True, outlives_client: bool = False) -> None:
        self.plan = plan
        self.outlives_client = outlives_client
        self.choices = [
            Choice(plan, gateway.model.make_detokenizer(plan.skip_special_tokens, plan.shown_tokens), index)
            for index in range(len(plan.requests))
        ]
        self.interrupted: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._gateway = gateway
        self._is_owner = is_owner
        self._streams: list[TokenStream] = []
        self._singly_until: Sequence[int] = ()  # tokens that are taken one by one
        self._timers: list[asyncio.TimerHandle] = []
        self._ttft_s: float | None = None
        self._last_token_s = [0.0] * len(plan.requests)

    @classmethod
    async def start(cls, plan: Plan, gateway: Gateway, terms: Terms) -> Generation:
        """Submit all choices, or none; the terms are those of the first. Raises ApiError, AlreadyClaimed."""
        generation = cls(plan, gateway, outlives_client=terms.claim is not None)
        try:
            for request in plan.requests:
                generation._streams.append(await gateway.broker.submit(request, terms))
                terms = Terms(quota=terms.quota)
        except AlreadyClaimed:
            raise
        except BrokerError as error:
            await generation._abort_unfinished()
            raise from_broker(error) from error
        except asyncio.CancelledError:
            await asyncio.shield(generation._abort_unfinished())
            raise
        gateway.in_flight.add(generation)
        gateway.metrics.num_waiting += 1
        generation._start_timers()
        return generation

    @classmethod
    def follow(
        cls, plan: Plan, gateway: Gateway, streams: Sequence[TokenStream], after: Sequence[int] = ()
    ) -> Generation:
        """Give an answer again. `after`: tokens of each choice that the client has; a delta ends exactly there."""
        generation = cls(plan, gateway, is_owner=False)
        generation._streams = list(streams)
        generation._singly_until = after
        gateway.in_flight.add(generation)
        return generation

    @property
    def quota_levels(self) -> tuple[Level, ...]:
        """How far the key's limits are used."""
        return self._streams[0].quota_levels

    @property
    def is_complete(self) -> bool:
        """All tokens are here."""
        return all(stream.is_complete for stream in self._streams)

    def deltas(self) -> AsyncIterator[Delta]:
        """Every choice ends with a delta that has a finish_reason. Raises ApiError if one fails."""
        return self._choice_deltas(0) if len(self._streams) == 1 else self._merged_deltas()

    def interrupt(self, error: ApiError) -> None:
        """End the answer with this error, unless it is ending already."""
        if not self.interrupted.done():
            self.interrupted.set_result(error)

    def usage(self) -> Usage:
        """What was generated so far. A prompt counts once, however many choices it has.

        So does what was found of it in a cache: later choices find what the first one computed.
        """
        num_choices = len(self.choices) // self.plan.num_prompts
        prompts = [self.choices[first : first + num_choices] for first in range(0, len(self.choices), num_choices)]
        return Usage(
            prompt_tokens=self.plan.prompt_tokens,
            cached_tokens=sum(
                min((choice.metrics.cached_tokens for choice in choices if choice.metrics), default=0)
                for choices in prompts
            ),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self.choices),
        )

    async def close(self, error: ApiError | None = None) -> None:
        """Abort what still runs, count and log. Called once, with what the client was told if it was an error."""
        for timer in self._timers:
            timer.cancel()
        self._gateway.in_flight.discard(self)
        if self._is_owner:
            self._count(error)
            await asyncio.shield(self._abort_unfinished())
        else:
            for stream in self._streams:
                stream.close()

    async def _choice_deltas(self, index: int) -> AsyncIterator[Delta]:
        choice = self.choices[index]
        try:
            async for event in self._events(index):
                text = self._push(index, event)
                reason = choice.finish_reason
                if reason is FinishReason.ERROR or reason is FinishReason.ABORT:
                    if text:
                        yield self._delta(index, text, None)
                    raise self._failure(event, reason)
                if choice.parser is None:  # most are
                    if text or reason is not None:
                        yield Delta(index, text, reason, choice.num_tokens, choice.take_logprobs())
                elif text or reason is not None:
                    yield self._delta(index, text, choice.told_reason)
                if reason is not None:
                    break
            assert choice.finish_reason is not None, f"{self.plan.request_id}: the stream ended without a last event"
        except BrokerError as error:
            raise from_broker(error) from error
        if not choice.is_stream_done:
            await self._abort(index, FinishReason.STOP)

    def _delta(self, index: int, text: str, reason: str | None) -> Delta:
        choice = self.choices[index]
        parts = Parts("", text, ()) if choice.parser is None else choice.parser.take()
        logprobs = choice.take_logprobs()
        return Delta(index, parts.content, reason, choice.num_tokens, logprobs, parts.reasoning, parts.calls)

    async def _merged_deltas(self) -> AsyncIterator[Delta]:
        queue: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()

        async def pump(index: int) -> None:
            async for delta in self._choice_deltas(index):
                queue.put_nowait(delta)

        tasks = [asyncio.create_task(pump(index)) for index in range(len(self._streams))]
        for task in tasks:
            task.add_done_callback(queue.put_nowait)
        num_open = len(tasks)
        try:
            while num_open:
                item = await queue.get()
                if isinstance(item, asyncio.Task):
                    item.result()
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _events(self, index: int) -> AsyncIterator[TokenEvent]:
        stream = self._streams[index]
        return singly(stream, self._singly_until[index]) if self._singly_until else stream

    def _push(self, index: int, event: TokenEvent) -> str:
        choice = self.choices[index]
        before = choice.num_tokens
        text = choice.push(event)
        if (num_new := choice.num_tokens - before) and self._is_owner:
            self._observe_tokens(index, num_new, is_first=before == 0)
        return text

    def _observe_tokens(self, index: int, num_new: int, *, is_first: bool) -> None:
        """Every token but a choice's first has a gap before it; tokens that came together share the time they took."""
        now_s = time.monotonic()
        inter_token_s = self._gateway.metrics.inter_token_s
        if not is_first:
            inter_token_s.observe((now_s - self._last_token_s[index]) / num_new, num_new)
        else:
            if num_new > 1:
                inter_token_s.observe(0.0, num_new - 1)
            if self._ttft_s is None:
                self._on_first_token()
        self._last_token_s[index] = now_s

    def _on_first_token(self) -> None:
        metrics = self._gateway.metrics
        self._ttft_s = self._age_s()
        metrics.ttft_s.observe(self._ttft_s)
        metrics.num_waiting -= 1
        metrics.num_running += 1

    def _age_s(self) -> float:
        return time.time() - self.plan.arrival_s

    def _failure(self, event: TokenEvent, reason: FinishReason) -> ApiError:
        deadline_s = self.plan.requests[0].deadline_s
        if reason is FinishReason.ABORT:
            return Cancelled("the request was cancelled")
        if deadline_s is not None and time.time() >= deadline_s:
            return DeadlineExceeded("the request did not finish by its deadline")
        return ServerFault(event.error or "the worker failed the request", code="generation_failed")

    def _start_timers(self) -> None:
        """The engine ends requests at their deadline; these end the answer also when no engine is there to do it."""
        loop = asyncio.get_running_loop()
        if (deadline_s := self.plan.requests[0].deadline_s) is not None:
            error = DeadlineExceeded("the request did not finish by its deadline")
            self._timers.append(loop.call_later(deadline_s - time.time(), self.interrupt, error))
        if self.plan.first_token_by_s is not None:
            self._timers.append(loop.call_later(self.plan.first_token_by_s - time.time(), self._check_first_token))

    def _check_first_token(self) -> None:
        if self._ttft_s is None:
            self.interrupt(DeadlineExceeded("the first token did not come by its deadline"))

    async def _abort_unfinished(self) -> None:
        for index in range(len(self._streams)):
            if not self.choices[index].is_stream_done:
                await self._abort(index, FinishReason.ABORT)

    async def _abort(self, index: int, reason: FinishReason) -> None:
        self.choices[index].is_stream_done = True
        stream = self._streams[index]
        stream.close()
        try:
            await self._gateway.broker.abort(stream.request_id, reason)
        except BrokerError as error:  # the answer is not at fault, and the worker stops at max_tokens
            logger.warning("request_id=%s abort failed: %s", stream.request_id, error)

    def _count(self, error: ApiError | None) -> None:
        metrics = self._gateway.metrics
        duration_s = self._age_s()
        if self._ttft_s is None:
            metrics.num_waiting -= 1
        else:
            metrics.num_running -= 1
        unfinished = FinishReason.ABORT if error is None or error.status < 500 else FinishReason.ERROR
        reasons = [choice.finish_reason or unfinished for choice in self.choices]
        is_whole = all(choice.finish_reason is not None for choice in self.choices)
        outcome = Outcome.of(error) if error else Outcome.OK if is_whole else Outcome.ABORTED
        usage = self.usage()
        metrics.count_end(Ended(self.plan.tenant, outcome, reasons, usage, duration_s))
        logger.info(
            "request_id=%s status=%d finish_reason=%s prompt_tokens=%d generated_tokens=%d ttft_ms=%s duration_ms=%.0f",
            self.plan.request_id,
            error.status if error else 200,
            ",".join(reasons),
            usage.prompt_tokens,
            usage.completion_tokens,
            "-" if self._ttft_s is None else f"{self._ttft_s * 1e3:.0f}",
            duration_s * 1e3,
        )
