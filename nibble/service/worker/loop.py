"""The worker's loop: exchange with the broker, step the engine, and again. One round trip per step.

It never sees text and never talks to Redis but through `WorkerBroker`. A request that the engine refuses ends with an
error event; an exception inside a step is a bug or a broken device: the requests are given up, so that other workers
take them over at once, and it is raised, so that the process exits non-zero.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from nibble.engine.errors import RequestError
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from nibble.engine.stats import EngineStats
from nibble.service.broker.errors import BrokerError, BrokerUnavailable
from nibble.service.broker.wire import Assignment, WorkerInfo, WorkerState
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.heartbeat import Heartbeat
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.watchdog import StepWatchdog

if TYPE_CHECKING:
    from nibble.service.worker.tracing import RequestSpans

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5  # pause between attempts while the broker is away; the engine rests meanwhile
MAX_STEP_S = 60.0  # the lease is kept so long through one turn of the loop, where nobody says otherwise


class Engine(Protocol):
    """What the loop needs of an engine: LLMEngine, or the load test's synthetic one."""

    stats: EngineStats

    @property
    def has_unfinished(self) -> bool: ...
    @property
    def capacity(self) -> int: ...
    @property
    def preemptible(self) -> list[str]: ...
    def add(self, request: GenerationRequest, generated_token_ids: Sequence[int] = ()) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...


class WorkerLoop:
    """Drives one engine for one broker until `stop` is called."""

    def __init__(
        self,
        engine: Engine,
        broker: WorkerBroker,
        metrics: WorkerMetrics,
        info: WorkerInfo,
        idle_wait_s: float,
        max_step_s: float = MAX_STEP_S,
        watchdog: StepWatchdog | None = None,
        spans: RequestSpans | None = None,
    ) -> None:
        """idle_wait_s: at most a third of the broker's lease, which the loop renews at least that often.

        watchdog: is told of each step; whoever made it starts and stops it. spans: where tracing is on.
        """
        self.engine = engine
        self.broker = broker
        self.metrics = metrics
        self._info = info
        self._idle_wait_s = idle_wait_s
        self._heartbeat = Heartbeat(broker, idle_wait_s, max_step_s)
        self._step_guard = watchdog or contextlib.nullcontext()
        self._spans = spans
        self._stopping = False
        self._events: list[TokenEvent] = []  # not yet taken by the broker

    def stop(self) -> None:
        """Ask the loop to end after the current step. Safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until stopped, then hand unfinished requests back.

        After an exception they are given up, which counts as a lost worker: a request that breaks every worker would
        otherwise go round for ever.
        """
        self._heartbeat.start()
        try:
            while not self._stopping:
                self.run_once()
        except Exception as error:
            self._heartbeat.stop()
            self._give_up(error)
            self._end_spans(error)
            raise
        self._heartbeat.stop()
        self._exchange(capacity=0, state="draining")
        self.broker.close()
        self._end_spans()

    def run_once(self) -> None:
        """One exchange and, if there is anything to compute, one step."""
        started_s = time.perf_counter()
        if not self._exchange(self.engine.capacity, "ready"):
            self.broker.wait(RECONNECT_S)
        elif self.engine.has_unfinished:
            with self._step_guard:
                events = self.engine.step()
            self._keep(events)
            self.metrics.observe_step(self.engine.stats)
            self.metrics.observe_turn(time.perf_counter() - started_s)
        elif not self._events:
            self.broker.wait(self._idle_wait_s)

    def _keep(self, events: Sequence[TokenEvent]) -> None:
        """For the next exchange."""
        self._events += events
        if self._spans is not None:
            self._spans.observe(events)

    def _end_spans(self, error: Exception | None = None) -> None:
        if self._spans is not None:
            self._spans.end_all(error)

    def _give_up(self, cause: Exception) -> None:
        logger.critical("event=worker_failed error=%r", cause)
        try:
            logger.critical("event=gave_up num_requests=%d", self.broker.give_up())
        except BrokerError as error:
            logger.critical("event=give_up_failed error=%r: the lease will expire", str(error))

    def _exchange(self, capacity: int, state: WorkerState) -> bool:
        """Hand over events and take requests. False: the broker is away and the events are kept."""
        stats = self.engine.stats
        info = WorkerInfo(
            worker_id=self._info.worker_id,
            model=self._info.model,
            device=self._info.device,
            state=state,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_cache_usage=stats.kv_cache_usage,
            max_num_sequences=self._info.max_num_sequences,
            tokens_per_s=self.metrics.tokens_per_s,
            max_context_tokens=self._info.max_context_tokens,
        )
        started_s = time.perf_counter()
        try:
            preemptible = self.engine.preemptible if state == "ready" else []
            exchange = self.broker.exchange(self._events, capacity, info, preemptible)
        except BrokerUnavailable as error:
            logger.warning("event=broker_unavailable error=%r held_events=%d", str(error), len(self._events))
            return False
        self._heartbeat.beat()
        self.metrics.observe_exchange(exchange, time.perf_counter() - started_s)
        self._log_finished(self._events)
        self._events = []
        for request_id in exchange.dropped:
            self.engine.abort(request_id)
            if self._spans is not None:
                self._spans.end(request_id, "dropped")
            logger.info("event=request_dropped request_id=%s", request_id)
        if exchange.dropped:  # an idle engine takes no step that would say so
            self.metrics.observe_step(self.engine.stats)
        for assignment in exchange.assignments:
            self._add(assignment)
        return True

    def _add(self, assignment: Assignment) -> None:
        request, generated = assignment.request, assignment.generated_token_ids
        if self._spans is not None:
            self._spans.begin(assignment)
        try:
            self.engine.add(request, generated)
        except RequestError as error:
            refusal = TokenEvent(
                request_id=request.request_id,
                index=len(generated),
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=str(error),
            )
            self._keep([refusal])

    def _log_finished(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is None:
                continue
            if event.metrics is not None:
                self.metrics.observe_request(event.metrics)
            m = event.metrics
            logger.info(
                "event=request_finished request_id=%s finish_reason=%s prompt_tokens=%s cached_tokens=%s "
                "generated_tokens=%s draft_tokens=%s accepted_tokens=%s queue_ms=%.1f prefill_ms=%.1f decode_ms=%.1f "
                "error=%s",
                event.request_id,
                event.finish_reason,
                m.prompt_tokens if m else None,
                m.cached_tokens if m else None,
                m.generated_tokens if m else None,
                m.draft_tokens if m else None,
                m.accepted_tokens if m else None,
                m.queue_s * 1e3 if m else 0.0,
                m.prefill_s * 1e3 if m else 0.0,
                m.decode_s * 1e3 if m else 0.0,
                event.error,
            )
