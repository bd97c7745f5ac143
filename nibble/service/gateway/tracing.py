"""The gateway's span of each request for text, from its arrival to the end of its answer.

Imported only where NIBBLE_TRACING is on. The span continues the trace that the client's `traceparent` names; its own
`traceparent` goes to the worker in the request.
"""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nibble.service.gateway.boundary import REQUEST_SPAN
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.usage import Usage

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/responses": "chat"}
_PROPAGATOR = TraceContextTextMapPropagator()


class TracedApp:
    """ASGI layer: requests for text have a RequestSpan in their scope; all others pass as they are."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        operation = _OPERATIONS.get(scope["path"]) if is_post else None
        if operation is None:
            await self._app(scope, receive, send)
            return
        attributes = {
            "http.request.method": "POST",
            "http.route": scope["path"],
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "nibble",
        }
        parent = _PROPAGATOR.extract(Headers(scope=scope))
        # What an exception says may have text of the prompt: its type has to do.
        with self._tracer.start_as_current_span(
            operation, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
        ) as span:

            async def send_noting(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            scope[REQUEST_SPAN] = RequestSpan(span, operation)
            try:
                await self._app(scope, receive, send_noting)
            except Exception as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise


class RequestSpan:
    """What happens to one request for text, said on its span. Whoever made the span ends it."""

    def __init__(self, span: Span, operation: str) -> None:
        self._span = span
        self._operation = operation

    @property
    def traceparent(self) -> str:
        """Of this span, for spans below it."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    def describe(self, plan: Plan, model: str) -> None:
        """Once the request is known to be valid."""
        sampling = plan.requests[0].sampling
        self._span.update_name(f"{self._operation} {model}")
        self._span.set_attributes(
            {
                "gen_ai.request.model": model,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
                "gen_ai.request.presence_penalty": sampling.presence_penalty,
                "gen_ai.request.choice.count": len(plan.requests),
                "gen_ai.request.stream": plan.stream,
                "gen_ai.response.model": model,
            }
        )
        if plan.tenant:
            self._span.set_attribute("nibble.key", plan.tenant)

    def on_answer(self, request_id: str) -> None:
        """Once there is one: of a repeated Idempotency-Key it is that of the request before."""
        self._span.set_attribute("gen_ai.response.id", request_id)

    def on_first_token(self, ttft_s: float) -> None:
        self._span.add_event("first_token", {"nibble.ttft_s": ttft_s})
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", ttft_s)

    def on_end(self, reasons: Sequence[str], usage: Usage) -> None:
        """reasons: of each choice."""
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": list(reasons),
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
            }
        )

    def on_error(self, error: ApiError) -> None:
        """What the client was told. Only where the service is to blame the span is in error, and has the message."""
        self._span.set_attribute("error.type", error.code or error.type)
        if error.status >= 500:
            self._span.set_status(StatusCode.ERROR, error.message)
