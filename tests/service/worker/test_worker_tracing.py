"""The worker's spans, read from OpenTelemetry's in-memory exporter: real loop, real broker, a synthetic engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from counting import CountingEngine, collect, make_request, running_worker, until
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from nibble.engine.protocol import GenerationRequest
from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.broker.wire import WorkerInfo
from nibble.service.broker.worker_side import WorkerBroker
from nibble.service.worker.loop import WorkerLoop
from nibble.service.worker.metrics import WorkerMetrics
from nibble.service.worker.tracing import RequestSpans

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def gateway(redis_url: str, namespace: str) -> AsyncIterator[GatewayBroker]:
    broker = GatewayBroker(redis_url, "g", namespace=namespace, needs_worker=False)
    await broker.start()
    yield broker
    await broker.close()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def spans_to(exporter: InMemorySpanExporter) -> RequestSpans:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return RequestSpans(provider.get_tracer("test"), "m")


def traced(request: GenerationRequest, flags: str = "01") -> GenerationRequest:
    return msgspec.structs.replace(request, traceparent=f"00-{TRACE_ID}-{SPAN_ID}-{flags}")


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_is_a_span_below_the_gateways(
    redis_url: str, namespace: str, gateway: GatewayBroker, exporter: InMemorySpanExporter
) -> None:
    with running_worker(redis_url, namespace, spans=spans_to(exporter)):
        await collect(await gateway.submit(traced(make_request("r"))))
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == ("generate m", SpanKind.CONSUMER, StatusCode.UNSET)
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, SPAN_ID)
    assert [event.name for event in span.events] == ["first_token"]
    expected = {
        "gen_ai.request.model": "m",
        "nibble.request_id": "r",
        "nibble.attempt": 1,
        "nibble.resumed_tokens": 0,
        "nibble.prompt_tokens": 1,
        "nibble.finish_reason": "length",
    }
    assert {name: attributes(span).get(name) for name in expected} == expected
    assert 0 <= attributes(span)["nibble.taken_after_s"] < 10


async def test_what_the_gateway_does_not_sample_the_worker_does_not(
    redis_url: str, namespace: str, gateway: GatewayBroker, exporter: InMemorySpanExporter
) -> None:
    with running_worker(redis_url, namespace, spans=spans_to(exporter)):
        await collect(await gateway.submit(traced(make_request("r"), flags="00")))
    assert not exporter.get_finished_spans()


async def test_a_request_that_goes_on_elsewhere_has_a_second_span(
    redis_url: str, namespace: str, gateway: GatewayBroker, exporter: InMemorySpanExporter
) -> None:
    with running_worker(redis_url, namespace, "first", spans_to(exporter)):
        stream = aiter(await gateway.submit(traced(make_request("r", max_tokens=100))))
        await anext(stream)
    with running_worker(redis_url, namespace, "second", spans_to(exporter)):
        await collect(stream)
    first, second = exporter.get_finished_spans()
    assert first.context.trace_id == second.context.trace_id
    assert first.context.span_id != second.context.span_id
    assert [attributes(span)["nibble.finish_reason"] for span in (first, second)] == ["handed_back", "length"]
    assert attributes(second)["nibble.attempt"] == 2
    assert attributes(second)["nibble.resumed_tokens"] > 0
    assert [event.name for event in second.events] == ["first_token"]


async def test_a_refused_request_and_an_aborted_one_end_their_spans(
    redis_url: str, namespace: str, gateway: GatewayBroker, exporter: InMemorySpanExporter
) -> None:
    with running_worker(redis_url, namespace, spans=spans_to(exporter)):
        await collect(await gateway.submit(make_request("bad", 0)))
        long = await gateway.submit(make_request("long", max_tokens=100_000))
        await anext(aiter(long))
        await gateway.abort("long")
        await until(lambda: len(exporter.get_finished_spans()) == 2)
    refused, aborted = exporter.get_finished_spans()
    assert (refused.status.status_code, refused.status.description) == (StatusCode.ERROR, "prompt has a zero")
    assert attributes(aborted)["nibble.finish_reason"] == "dropped"
    assert aborted.status.status_code is StatusCode.UNSET


async def test_a_broken_worker_says_why_on_what_it_had(
    redis_url: str, namespace: str, gateway: GatewayBroker, exporter: InMemorySpanExporter
) -> None:
    await gateway.submit(make_request("poison", 1))
    info = WorkerInfo(worker_id="w", model="m", device="d", state="ready", max_num_sequences=4)
    broker = WorkerBroker(redis_url, "w", namespace=namespace)
    metrics = WorkerMetrics("m", 1e9, False)
    loop = WorkerLoop(CountingEngine(), broker, metrics, info, idle_wait_s=0.5, spans=spans_to(exporter))
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(loop.run)
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ZeroDivisionError('a bug')")
