"""The ASGI application of the gateway: routes, error answers, and the layers around them (pure ASGI, all of them).

Boundary (request id, counting, 500) -> TracedApp, if tracing is on -> CORS, if asked for -> ApiKeyMiddleware
-> FastAPI (routes; ApiError -> JSON)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from nibble.service.broker.gateway_side import GatewayBroker
from nibble.service.gateway.api_keys import KeyRing
from nibble.service.gateway.auth import ApiKeyMiddleware
from nibble.service.gateway.boundary import Boundary
from nibble.service.gateway.errors import ApiError, InvalidRequest, MethodNotAllowed, NotFound, ServerFault
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.metrics import GatewayMetrics
from nibble.service.gateway.openapi_document import openapi_document
from nibble.service.gateway.routes import (
    chat_completions,
    completions,
    models,
    operations,
    playground,
    responses,
    tokenization,
)
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.responses import ResponseRequest
from nibble.service.gateway.schema.text import CompletionRequest
from nibble.service.gateway.schema.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from nibble.service.gateway.served_model import load_served_model
from nibble.service.gateway.settings import GatewaySettings
from nibble.service.version import nibble_version

if TYPE_CHECKING:
    from nibble.service.tracing import Tracer

_ROUTERS = (
    chat_completions.router,
    completions.router,
    responses.router,
    models.router,
    tokenization.router,
    operations.router,
)
# What a page of another origin may read.
_EXPOSED_HEADERS = (
    "x-request-id",
    "x-nibble-ignored",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)
_BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseRequest,
    TokenizeTextRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)


def create_gateway(settings: GatewaySettings) -> Gateway:
    """Read the model's files; nothing is connected yet.

    Raises ModelFilesError, UnsupportedDecoder, KeyFileError, SettingsError.
    """
    keys = KeyRing(settings.api_keys, settings.api_keys_file)
    model = load_served_model(
        settings.model_dir,
        settings.model_name,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
    )
    broker = GatewayBroker(
        settings.redis_url,
        settings.gateway_id,
        namespace=settings.namespace,
        max_queued=settings.max_queued_requests,
        needs_worker=settings.needs_worker,
        no_worker_timeout_s=settings.no_worker_timeout_s,
        max_attempts=settings.max_attempts,
        log_ttl_s=settings.log_ttl_s,
    )
    metrics = GatewayMetrics(model.name, vllm_names=settings.vllm_metric_names)
    return Gateway(settings, model, broker, metrics, keys, _tracer(settings))


def _tracer(settings: GatewaySettings) -> Tracer | None:
    if not settings.tracing:
        return None
    from nibble.service.tracing import make_tracer

    return make_tracer("gateway", settings.gateway_id)


def create_app(gateway: Gateway) -> ASGIApp:
    """The application. Its lifespan connects the broker and closes it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.broker.start()
        try:
            yield
        finally:
            await gateway.broker.close()

    app = FastAPI(title="Nibble", version=nibble_version(), lifespan=lifespan, redoc_url=None)
    app.state.gateway = gateway
    for router in _ROUTERS:
        app.include_router(router)
    if gateway.settings.playground:
        app.include_router(playground.router)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # FastAPI's documented way to extend it
    settings = gateway.settings
    inner: ASGIApp = ApiKeyMiddleware(app, keys=gateway.keys, metrics_public=settings.metrics_public)
    if settings.cors_origins:  # outside the keys: a browser's preflight request has none
        inner = CORSMiddleware(
            inner,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )
    if gateway.tracer is not None:
        from nibble.service.gateway.tracing import TracedApp

        inner = TracedApp(inner, gateway.tracer)
    return Boundary(inner, gateway.metrics.responses)


async def _answer_error(request: Request, error: Exception) -> Response:
    """OpenAI's shape for our own errors, for the framework's (unknown URL, wrong method), and for bugs."""
    answer = error if isinstance(error, ApiError) else _from_framework(request, error)
    headers = {**answer.headers, **(getattr(error, "headers", None) or {})}
    if isinstance(answer, MethodNotAllowed):
        headers["Allow"] = _allowed_methods(request) or headers["Allow"]
    return Response(answer.body(), answer.status, headers, "application/json")


def _from_framework(request: Request, error: Exception) -> ApiError:
    if not isinstance(error, HTTPException):
        return ServerFault("internal error; the log of the gateway has its cause")  # Boundary logs it
    where = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return NotFound(f"unknown URL: {where}", code="unknown_url")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed(f"method not allowed: {where}")
    return InvalidRequest(str(error.detail))


def _allowed_methods(request: Request) -> str:
    """Of a URL; the framework names those of one of its routes alone."""
    methods: set[str] = set()
    for route in (route for router in _ROUTERS for route in router.routes):
        if isinstance(route, Route) and route.matches(request.scope)[0] is Match.PARTIAL:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = openapi_document(app, _BODIES, app.state.gateway.model.name)
    return app.openapi_schema
