"""Traces of the whole service as a collector gets them: OTLP over HTTP, from the gateway and from workers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_service import STOP_TIMEOUT_S, RunningService, free_ports

Run = Callable[..., AbstractContextManager[RunningService]]
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATIENCE_S = 30.0


class Collector:
    """What was exported so far: service name and span."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.paths: set[str] = set()

    def receive(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (name,) = [
                entry.value.string_value for entry in resource.resource.attributes if entry.key == "service.name"
            ]
            self.spans += [(name, span) for scope in resource.scope_spans for span in scope.spans]

    def wait_for(self, count: int, service: str) -> list[Any]:
        """The spans of a service, by their start."""
        end_s = time.monotonic() + PATIENCE_S
        while len(found := [span for name, span in list(self.spans) if name == service]) < count:
            assert time.monotonic() < end_s, self.spans
            time.sleep(0.05)
        return sorted(found, key=lambda span: span.start_time_unix_nano)


@contextmanager
def running_collector() -> Iterator[tuple[str, Collector]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.receive(self.path, self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def values(span: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in span.attributes}


def chat(service: RunningService, max_tokens: int, on_chunk: Callable[[int], None] = lambda _: None) -> None:
    """Streamed, of exactly so many tokens, as part of a client's trace."""
    stream = service.client().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"},
    )
    for i, _ in enumerate(stream):
        on_chunk(i)


def tracing_to(url: str) -> dict[str, str]:
    return {"NIBBLE_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}


def test_a_request_is_one_trace_from_the_client_to_the_worker_that_took_over(run_service: Run) -> None:
    """The first worker is killed in the middle: its span is lost with it, the one of its successor says attempt 2."""
    with running_collector() as (url, collector), run_service(**tracing_to(url)) as service:
        chat(service, 4)
        (whole,) = collector.wait_for(1, "nibble-gateway")
        (work,) = collector.wait_for(1, "nibble-worker")
        assert (whole.name, work.name) == ("chat demo", "generate demo")
        assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
        assert (work.trace_id.hex(), work.parent_span_id) == (TRACE_ID, whole.span_id)
        assert whole.start_time_unix_nano <= work.start_time_unix_nano < whole.end_time_unix_nano
        assert values(whole)["gen_ai.usage.output_tokens"] == values(work)["nibble.generated_tokens"] == 4
        assert values(work)["nibble.attempt"] == 1
        assert 0 <= values(work)["nibble.queue_s"] < 10
        assert values(work)["nibble.prefill_s"] > 0

        chat(service, 60, lambda i: service.workers()[0].kill() if i == 10 else None)
        _, recovered = collector.wait_for(2, "nibble-worker")
        assert values(recovered)["nibble.attempt"] == 2
        assert values(recovered)["nibble.resumed_tokens"] > 0
        assert values(recovered)["nibble.finish_reason"] == "length"
        assert collector.paths == {"/v1/traces"}


def test_a_collector_that_is_not_there_delays_neither_answers_nor_the_end(run_service: Run) -> None:
    with run_service(**tracing_to(f"http://127.0.0.1:{free_ports(1)}")) as service:
        started_s = time.monotonic()
        chat(service, 4)
        assert time.monotonic() - started_s < 5
        children = service.descendants()
        assert service.signal(signal.SIGTERM) < STOP_TIMEOUT_S
        assert not [child for child in children if child.is_running()]


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "console")]
)
def test_what_is_not_supported_is_refused_at_start(run_service: Run, name: str, value: str) -> None:
    with (
        pytest.raises(AssertionError, match=f"{name}: only .* is supported"),
        run_service(NIBBLE_TRACING="true", **{name: value}),
    ):
        pass
