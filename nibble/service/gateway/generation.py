"""One client request in flight: its choices' token streams, merged into one sequence of deltas.

Both kinds of answer are made of these deltas: `completion.py` encodes each, or folds them all. A delta is made and
passed on in the call that tells of its tokens, without a task in between: waking one costs as much as all the rest.
Whatever happens, `close` is called once: it aborts what still runs, so that no worker generates for nobody. A
generation that was not started but is followed (`follow.py`) belongs to somebody else: nothing is aborted, and nothing
counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.errors import AlreadyClaimed, BrokerError
from nibble.service.broker.terms import Level, Terms
from nibble.service.broker.token_stream import TokenStream
from nibble.service.gateway.answer_parser import Parts
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.errors import (
    ApiError,
    Cancelled,
    DeadlineExceeded,
    ServerFault,
    from_broker,
    no_token_left,
)
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.progress import Progress
from nibble.service.gateway.regroup import singly
from nibble.service.gateway.tool_call_parser import CallDelta
from nibble.service.gateway.usage import Usage

if TYPE_CHECKING:
    from nibble.service.gateway.tracing import RequestSpan

logger = logging.getLogger(__name__)


class Delta(msgspec.Struct, frozen=True, gc=False):
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
    """Made by `start` or `follow`. When `interrupted` is set, the client is told that error and `run` is cancelled.

    progress: of one started here. outlives_client: it goes on when its client leaves, who may come back for it.
    """

    def __init__(
        self, plan: Plan, gateway: Gateway, progress: Progress | None = None, *, outlives_client: bool = False
    ) -> None:
        self.plan = plan
        self.outlives_client = outlives_client
        self.choices = [
            Choice(plan, gateway.model.make_detokenizer(plan.skip_special_tokens, plan.shown_tokens), index)
            for index in range(len(plan.requests))
        ]
        self.interrupted: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._gateway = gateway
        self._streams: list[TokenStream] = []
        self._choice_of: dict[TokenStream, Choice] = {}  # from `run` on
        # Tokens of each choice that are taken one by one. Events of a response are numbered: all of its tokens are, so
        # that the numbers are the same however they came.
        self._singly_until: Sequence[int] = (sys.maxsize,) if plan.response else ()
        self._on_delta: Callable[[Delta], object] = _nobody
        self._is_running = False  # else tokens wait in their streams
        self._num_open = len(plan.requests)
        self._ended = asyncio.Event()  # all choices have, or one failed
        self._error: Exception | None = None
        self._aborts: list[asyncio.Task[None]] = []  # of choices that a stop string ended
        self._timers: list[asyncio.TimerHandle] = []
        self._progress = progress

    @classmethod
    async def start(cls, plan: Plan, gateway: Gateway, terms: Terms, span: RequestSpan | None = None) -> Generation:
        """Submit all choices, or none; the terms are those of the first. span: where tracing is on.

        Raises ApiError, AlreadyClaimed.
        """
        progress = Progress(plan, gateway.metrics, span)
        generation = cls(plan, gateway, progress, outlives_client=terms.claim is not None)
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
        progress.begin()
        generation._start_timers()
        return generation

    @classmethod
    def follow(
        cls, plan: Plan, gateway: Gateway, streams: Sequence[TokenStream], after: Sequence[int] = ()
    ) -> Generation:
        """Give an answer again. `after`: tokens of each choice that the client has; a delta ends exactly there."""
        generation = cls(plan, gateway)
        generation._streams = list(streams)
        if after:
            generation._singly_until = after
        gateway.in_flight.add(generation)
        return generation

    @property
    def is_owner(self) -> bool:
        """It was started here, not followed."""
        return self._progress is not None

    @property
    def quota_levels(self) -> tuple[Level, ...]:
        """How far the key's limits are used."""
        return self._streams[0].quota_levels

    @property
    def is_complete(self) -> bool:
        """All tokens are here."""
        return all(stream.is_complete for stream in self._streams)

    async def run(self, on_delta: Callable[[Delta], object]) -> None:
        """Pass on every delta; each choice's last one has a finish_reason. Raises ApiError if a choice fails."""
        self._on_delta = on_delta
        self._choice_of = dict(zip(self._streams, self.choices, strict=True))
        for stream in self._streams:
            stream.on_event = self._on_event
        try:
            self.resume()
            await self._ended.wait()
            await asyncio.gather(*self._aborts)
        finally:
            self.pause()
            self._on_delta = _nobody
            for stream in self._streams:
                stream.on_event = None
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Let tokens wait, and come together. Deltas of those that came already still follow."""
        self._is_running = False

    def resume(self) -> None:
        self._is_running = self._error is None
        for stream in self._streams:
            self._on_event(stream)

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
        if self._progress is not None:
            self._progress.end(self.choices, self.usage(), error)
            await asyncio.shield(self._abort_unfinished())
        else:
            for stream in self._streams:
                stream.close()

    def _on_event(self, stream: TokenStream) -> None:
        """Pass on what has come of a choice."""
        if not self._is_running or (event := stream.take()) is None:
            return
        choice = self._choice_of[stream]
        try:
            if self._singly_until:
                for part in singly(event, self._singly_until[choice.index]):
                    self._pass_on(choice, part)
            else:
                self._pass_on(choice, event)
        except Exception as error:  # whatever it is ends this answer, and no other one
            self._error = error
            self._is_running = False
            self._ended.set()

    def _pass_on(self, choice: Choice, event: TokenEvent) -> None:
        if choice.finish_reason is not None:
            return  # a stop string ended it in an earlier part of the same event
        num_before = choice.num_tokens
        text = choice.push(event)
        if self._progress is not None and (num_new := choice.num_tokens - num_before):
            self._progress.observe(choice, num_new, is_first=num_before == 0)
        reason = choice.finish_reason
        if text and reason is None and choice.is_plain:  # as mostly
            self._on_delta(Delta(choice.index, text, None, choice.num_tokens))
            return
        if reason is FinishReason.ERROR or reason is FinishReason.ABORT:
            if text:
                self._on_delta(self._delta(choice, text, None))
            raise self._failure(event, reason, choice.num_tokens)
        if text or reason is not None:
            self._on_delta(self._delta(choice, text, choice.told_reason))
            if reason is not None:
                self._on_choice_end(choice)

    def _delta(self, choice: Choice, text: str, reason: str | None) -> Delta:
        parts = Parts("", text, ()) if choice.parser is None else choice.parser.take()
        logprobs = choice.take_logprobs()
        return Delta(choice.index, parts.content, reason, choice.num_tokens, logprobs, parts.reasoning, parts.calls)

    def _on_choice_end(self, choice: Choice) -> None:
        if not choice.is_stream_done:
            choice.is_stream_done = True
            self._aborts.append(asyncio.create_task(self._abort(choice.index, FinishReason.STOP)))
        self._num_open -= 1
        if self._num_open == 0:
            self._ended.set()

    def _failure(self, event: TokenEvent, reason: FinishReason, num_tokens: int) -> ApiError:
        deadline_s = self.plan.requests[0].deadline_s
        if reason is FinishReason.ABORT:
            return Cancelled("the request was cancelled")
        if deadline_s is not None and time.time() >= deadline_s:
            return DeadlineExceeded("the request did not finish by its deadline")
        if event.error_fields:
            return no_token_left(event.error_fields, num_tokens)
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
        if self._progress is not None and self._progress.ttft_s is None:
            self.interrupt(DeadlineExceeded("the first token did not come by its deadline"))

    async def _abort_unfinished(self) -> None:
        for index in range(len(self._streams)):
            if not self.choices[index].is_stream_done:
                self.choices[index].is_stream_done = True
                await self._abort(index, FinishReason.ABORT)

    async def _abort(self, index: int, reason: FinishReason) -> None:
        stream = self._streams[index]
        stream.close()
        try:
            await self._gateway.broker.abort(stream.request_id, reason)
        except BrokerError as error:  # the answer is not at fault, and the worker stops at max_tokens
            logger.warning("request_id=%s abort failed: %s", stream.request_id, error)


def _nobody(delta: Delta) -> None:
    """Deltas before and after `run`."""
