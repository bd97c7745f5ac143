"""The gateway's spans, read from OpenTelemetry's in-memory exporter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import openai
import pytest
from conftest import RunningGateway, echo, wait_for
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MESSAGES: Any = [{"role": "user", "content": "hello there"}]


class Traced:
    """A gateway and its spans."""

    def __init__(self, running: RunningGateway, exporter: InMemorySpanExporter) -> None:
        self.running = running
        self.exporter = exporter

    def span(self) -> ReadableSpan:
        """The only one there is: it ends a moment after the client has its answer."""
        wait_for(self.exporter.get_finished_spans)
        (span,) = self.exporter.get_finished_spans()
        return span

    def chat(self, **options: Any) -> Any:
        return self.running.openai().chat.completions.create(model="small", messages=MESSAGES, **options)


@pytest.fixture(scope="module")
def shared(run_gateway: Callable[..., Any]) -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with run_gateway(tracer=provider.get_tracer("test"), api_keys=("none",)) as running:
        yield Traced(running, exporter)


@pytest.fixture
def traced(shared: Traced) -> Traced:
    shared.exporter.clear()
    shared.running.worker.seen.clear()
    shared.running.worker.reply = echo(shared.running.gateway.model)
    return shared


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_span_with_the_names_of_the_genai_conventions(traced: Traced, stream: bool) -> None:
    answer = traced.chat(stream=stream, temperature=0.5, max_tokens=50)
    if stream:
        answer = list(answer)[-1]
    span = traced.span()
    assert (span.name, span.kind, span.status.status_code) == ("chat small", SpanKind.SERVER, StatusCode.UNSET)
    request = traced.running.worker.seen[0]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "nibble",
        "gen_ai.request.model": "small",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.stream": stream,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
        "gen_ai.usage.output_tokens": len(traced.running.gateway.model.encode("hello there")) + 1,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "http.response.status_code": 200,
    }
    assert {name: attributes(span).get(name) for name in expected} == expected
    (event,) = span.events
    assert event.name == "first_token"
    assert event.attributes
    assert 0 < event.attributes["nibble.ttft_s"] < 30  # type: ignore[operator]
    assert "hello" not in span.to_json()


def test_the_trace_of_the_client_goes_on_to_the_worker(traced: Traced) -> None:
    traced.chat(n=2, extra_headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"})
    span = traced.span()
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, SPAN_ID)
    own = f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert [request.traceparent for request in traced.running.worker.seen] == [own, own]


def test_what_a_client_does_not_sample_nobody_does(traced: Traced) -> None:
    traced.chat(extra_headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-00"})
    assert traced.running.worker.seen[0].traceparent.startswith(f"00-{TRACE_ID}-")
    assert traced.running.worker.seen[0].traceparent.endswith("-00")
    traced.chat()
    assert f"{traced.span().context.trace_id:032x}" != TRACE_ID


@pytest.mark.parametrize("header", ["", "00-zz-zz-01", f"00-{'0' * 32}-{SPAN_ID}-01"])
def test_a_header_that_names_no_trace_begins_one(traced: Traced, header: str) -> None:
    traced.chat(extra_headers={"traceparent": header})
    assert traced.span().parent is None


def test_a_request_at_fault_has_its_code_and_is_no_error_of_the_service(traced: Traced) -> None:
    with pytest.raises(openai.NotFoundError):
        traced.running.openai().chat.completions.create(model="other", messages=MESSAGES)
    span = traced.span()
    assert (span.name, span.status.status_code) == ("chat", StatusCode.UNSET)
    assert attributes(span)["error.type"] == "model_not_found"
    assert attributes(span)["http.response.status_code"] == 404


def test_a_repeated_request_names_the_answer_that_it_gets(traced: Traced) -> None:
    first, second = (traced.chat(extra_headers={"Idempotency-Key": "k"}) for _ in range(2))
    wait_for(lambda: len(traced.exporter.get_finished_spans()) == 2)
    assert first.id == second.id
    assert [attributes(span)["gen_ai.response.id"] for span in traced.exporter.get_finished_spans()] == [first.id] * 2


def test_a_bug_is_an_error_without_what_the_exception_says(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> None:
        raise ZeroDivisionError("hello there")

    monkeypatch.setattr(traced.running.gateway, "fleet", broken)
    with pytest.raises(openai.InternalServerError):
        traced.chat()
    span = traced.span()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ZeroDivisionError")
    assert attributes(span)["http.response.status_code"] == 500
    assert "hello" not in span.to_json()


def test_a_refused_key_ends_its_span(traced: Traced) -> None:
    traced.running.post({"model": "small", "messages": MESSAGES}, authorization="Bearer wrong")
    assert attributes(traced.span())["http.response.status_code"] == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_generation_is_an_error(traced: Traced, stream: bool) -> None:
    body: Any = [{"role": "user", "content": "fail"}]
    with suppress(openai.APIError):
        answer = traced.running.openai().chat.completions.create(model="small", messages=body, stream=stream)
        list(answer)
    span = traced.span()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "fail")
    assert attributes(span)["error.type"] == "generation_failed"


def test_a_client_that_leaves_ends_its_span(traced: Traced) -> None:
    messages: Any = [{"role": "user", "content": "random 100000"}]
    stream = traced.running.openai().chat.completions.create(model="small", messages=messages, stream=True)
    next(iter(stream))
    stream.close()
    span = traced.span()
    assert attributes(span)["gen_ai.response.finish_reasons"] == ("abort",)
    assert span.status.status_code is StatusCode.UNSET


def test_other_requests_are_not_traced(traced: Traced) -> None:
    traced.running.reply_with("a b c")
    traced.running.openai().models.list()
    traced.running.openai().completions.create(model="small", prompt="x", max_tokens=1)
    assert traced.span().name == "text_completion small"


def test_no_header_reaches_a_worker_where_tracing_is_off(running: RunningGateway) -> None:
    running.worker.seen.clear()
    headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    running.openai().chat.completions.create(model="small", messages=MESSAGES, extra_headers=headers)
    assert running.worker.seen[0].traceparent == ""
