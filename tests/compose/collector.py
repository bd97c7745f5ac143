"""A collector of traces for tests: POST /v1/traces takes OTLP, GET /spans tells all that came, as JSON.

Runs in the gateway's image, which has OpenTelemetry's messages.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SPANS: list[dict[str, Any]] = []


def spans_of(request: ExportTraceServiceRequest) -> list[dict[str, Any]]:
    return [
        {
            **{entry.key: entry.value.string_value for entry in resource.resource.attributes},
            "name": span.name,
            "trace_id": span.trace_id.hex(),
            "span_id": span.span_id.hex(),
            "parent_span_id": span.parent_span_id.hex(),
        }
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        SPANS.extend(spans_of(ExportTraceServiceRequest.FromString(body)))
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(json.dumps(SPANS).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", 4318), Handler).serve_forever()
