"""The worker's only HTTP: GET /metrics for Prometheus, GET /health for whoever may restart it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import make_wsgi_app

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

Health = Callable[[], tuple[bool, Mapping[str, float]]]  # whether it is well, and what /health says besides


def serve_http(host: str, port: int, registry: CollectorRegistry, health: Health) -> WSGIServer:
    """Answer in a background thread until `shutdown` is called. Raises OSError where the port is taken."""
    metrics: WSGIApplication = make_wsgi_app(registry)

    def app(environment: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environment["PATH_INFO"] != "/health":
            return metrics(environment, start_response)
        is_well, facts = health()
        status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
        start_response(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
        return [json.dumps({"status": "ok" if is_well else "stalled", **facts}).encode()]

    server_class = _IPv6Server if ":" in host else _Server
    server: WSGIServer = make_server(host, port, app, server_class=server_class, handler_class=_SilentHandler)
    threading.Thread(target=server.serve_forever, name="nibble-http", daemon=True).start()
    return server


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request: a scrape that is read slowly must not delay an answer of /health."""

    daemon_threads = True


class _IPv6Server(_Server):
    address_family = socket.AF_INET6


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""
