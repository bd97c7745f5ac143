"""The worker's span of each request that it has, from taking it to its last token. A request that another worker goes
on with has a second one there, with a higher attempt.

Imported only where NIBBLE_TRACING is on. Spans continue the trace of the gateway's, whose `traceparent` is in the
request. Tokens are counted under our own names here: whoever adds up `gen_ai.usage.*` finds each request once, at the
gateway. Used by the loop's thread alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.service.broker.wire import Assignment

_PROPAGATOR = TraceContextTextMapPropagator()


class RequestSpans:
    """Those of the requests that a worker has."""

    def __init__(self, tracer: Tracer, model: str) -> None:
        self._tracer = tracer
        self._model = model
        self._spans: dict[str, Span] = {}
        self._without_token: set[str] = set()  # from this worker

    def begin(self, assignment: Assignment) -> None:
        request = assignment.request
        self.end(request.request_id, "replaced")  # a new attempt of what this worker has already
        self._spans[request.request_id] = self._tracer.start_span(
            f"generate {self._model}",
            _PROPAGATOR.extract({"traceparent": request.traceparent}),
            SpanKind.CONSUMER,
            {
                "gen_ai.request.model": self._model,
                "nibble.request_id": request.request_id,
                "nibble.attempt": assignment.attempt,
                "nibble.resumed_tokens": len(assignment.generated_token_ids),
                "nibble.prompt_tokens": len(request.prompt_token_ids),
                "nibble.taken_after_s": max(0.0, time.time() - request.arrival_s),
            },
        )
        self._without_token.add(request.request_id)

    def observe(self, events: Sequence[TokenEvent]) -> None:
        """Of one step, when it is done."""
        for event in events:
            request_id = event.request_id
            if event.token_ids and request_id in self._without_token:
                self._without_token.discard(request_id)
                self._spans[request_id].add_event("first_token")
            if event.metrics is not None and request_id in self._spans:
                self._spans[request_id].set_attributes(_measured(event.metrics))
            if event.finish_reason is not None:
                self.end(request_id, event.finish_reason.value, event.error)

    def end(self, request_id: str, reason: str, error: str | None = None) -> None:
        """Nothing happens if it has ended. error: what went wrong here."""
        span = self._spans.pop(request_id, None)
        if span is None:
            return
        self._without_token.discard(request_id)
        span.set_attribute("nibble.finish_reason", reason)
        if error is not None:
            span.set_attribute("error.type", reason)
            span.set_status(StatusCode.ERROR, error)
        span.end()

    def end_all(self, error: Exception | None = None) -> None:
        """This worker stops; with an error, because it is broken."""
        for request_id in list(self._spans):
            if error is None:
                self.end(request_id, "handed_back")
            else:
                self.end(request_id, FinishReason.ERROR.value, repr(error))


def _measured(metrics: RequestMetrics) -> dict[str, int | float]:
    return {
        "nibble.queue_s": metrics.queue_s,
        "nibble.prefill_s": metrics.prefill_s,
        "nibble.decode_s": metrics.decode_s,
        "nibble.cached_tokens": metrics.cached_tokens,
        "nibble.generated_tokens": metrics.generated_tokens,
        "nibble.draft_tokens": metrics.draft_tokens,
        "nibble.accepted_tokens": metrics.accepted_tokens,
    }
