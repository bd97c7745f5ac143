"""From the body of a request for text to its answer: the same for all endpoints that generate."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.responses import Response

from nibble.service.broker.errors import BrokerError
from nibble.service.gateway.auth import TENANT
from nibble.service.gateway.completion import Identity
from nibble.service.gateway.errors import ApiError, InvalidRequest, Unavailable, from_broker
from nibble.service.gateway.field_support import ignored_header
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.generation import Generation
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.responses import CompletionResponse, StreamResponse
from nibble.service.gateway.routes.body import gateway_of, read_body
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.shapes import Shape

logger = logging.getLogger(__name__)

_MAX_TIMEOUT_MS = 24 * 3600 * 1000
PlanMaker = Callable[[bytes, ServedModel, ClientContext], Awaitable[Plan]]
ShapeMaker = Callable[[Callable[[int], bytes]], Shape]


async def answer(request: Request, id_prefix: str, make: PlanMaker, shape: ShapeMaker) -> Response:
    """Raises ApiError."""
    gateway = gateway_of(request)
    request_id = f"{id_prefix}-{secrets.token_hex(16)}"
    arrival_s = time.time()
    try:
        client = _client_context(request, gateway, request_id, arrival_s)
        return await _answer(request, gateway, client, make, shape(gateway.model.token_bytes))
    except ApiError as error:
        logger.info(
            "request_id=%s status=%d code=%s param=%s duration_ms=%.0f",
            request_id,
            error.status,
            error.code,
            error.param,
            (time.time() - arrival_s) * 1e3,
        )
        raise


async def _answer(request: Request, gateway: Gateway, client: ClientContext, make: PlanMaker, shape: Shape) -> Response:
    if gateway.is_draining:
        raise Unavailable("the gateway is shutting down", code="shutting_down", retry_after_s=1.0)
    body = await read_body(request, gateway.settings.max_body_bytes)
    try:
        fleet = await gateway.fleet()
    except BrokerError as error:
        raise from_broker(error) from error
    plan = await make(body, fleet.model, client)
    headers = _headers(plan)
    identity = Identity(plan.request_id, gateway.model.name, int(plan.arrival_s), fleet.fingerprint, plan.service_tier)
    generation = await Generation.start(plan, gateway)
    if plan.stream:
        return StreamResponse(generation, identity, shape, headers, gateway.settings.keep_alive_s)
    return CompletionResponse(generation, identity, shape, headers)


def _client_context(request: Request, gateway: Gateway, request_id: str, arrival_s: float) -> ClientContext:
    tenant = request.scope.get(TENANT, "")
    return ClientContext(
        request_id=request_id,
        arrival_s=arrival_s,
        deadline_s=_time_limit(request, "x-nibble-timeout-ms", arrival_s),
        first_token_by_s=_time_limit(request, "x-nibble-ttft-timeout-ms", arrival_s),
        tenant=tenant,
        default_max_tokens=gateway.settings.default_max_tokens,
        cache_scope=tenant if gateway.settings.cache_per_key else "",
    )


def _time_limit(request: Request, header: str, arrival_s: float) -> float | None:
    value = request.headers.get(header)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= _MAX_TIMEOUT_MS):
        raise InvalidRequest(f"{header}: should be an integer from 1 to {_MAX_TIMEOUT_MS}", param=header)
    return arrival_s + int(value) / 1e3


def _headers(plan: Plan) -> dict[str, str]:
    if not plan.ignored:
        return {}
    names = ignored_header(plan.ignored)
    logger.info("request_id=%s ignored=%s", plan.request_id, names)
    return {"x-nibble-ignored": names}
