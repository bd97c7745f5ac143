"""From the body of a request for text to its answer: the same for all endpoints that generate."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.responses import Response

from nibble.service.broker.errors import AlreadyClaimed, BrokerError
from nibble.service.broker.terms import Claim, Terms
from nibble.service.gateway.api_keys import ApiKey
from nibble.service.gateway.auth import API_KEY
from nibble.service.gateway.boundary import REQUEST_SPAN
from nibble.service.gateway.completion import Identity
from nibble.service.gateway.errors import ApiError, IdempotencyConflict, InvalidRequest, Unavailable, from_broker
from nibble.service.gateway.field_support import ignored_header
from nibble.service.gateway.follow import Asker, cancel, follow, positions_in
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.generation import Generation
from nibble.service.gateway.metrics import Outcome
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.rate_limits import rate_limit_headers
from nibble.service.gateway.recipe import Recipe, encode_recipe
from nibble.service.gateway.routes.body import gateway_of, json_response, read_body
from nibble.service.gateway.served_model import ServedModel

if TYPE_CHECKING:
    from nibble.service.gateway.tracing import RequestSpan

logger = logging.getLogger(__name__)

_MAX_TIMEOUT_MS = 24 * 3600 * 1000
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
PlanMaker = Callable[[bytes, Gateway, ServedModel, ClientContext], Awaitable[Plan]]


@dataclass(frozen=True)
class Answer:
    """What goes to the client is made of these. after: see Generation.follow."""

    gateway: Gateway
    recipe: Recipe
    generation: Generation
    headers: Mapping[str, str]
    after: Sequence[int] = ()


@dataclass(frozen=True)
class Endpoint:
    """One that generates. name: in recipes, and of the object that a cancelled request is."""

    name: str
    id_prefix: str
    make_plan: PlanMaker
    respond: Callable[[Answer], Response]


async def answer(request: Request, endpoint: Endpoint) -> Response:
    """Raises ApiError."""
    gateway = gateway_of(request)
    request_id = f"{endpoint.id_prefix}{secrets.token_hex(16)}"
    arrival_s = time.time()
    try:
        client = _client_context(request, gateway, request_id, arrival_s)
        return await _answer(request, gateway, client, endpoint)
    except ApiError as error:
        if (span := _span_of(request)) is not None:
            span.on_error(error)
        gateway.metrics.count_outcome(Outcome.of(error), asker_of(request, endpoint).tenant)
        logger.info(
            "request_id=%s status=%d code=%s param=%s duration_ms=%.0f",
            request_id,
            error.status,
            error.code,
            error.param,
            (time.time() - arrival_s) * 1e3,
        )
        raise


async def resumed(
    request: Request, request_id: str, endpoint: Endpoint, stream: Callable[[Answer], Response]
) -> Response:
    """The stream of a request, running or finished not long ago, from the event after Last-Event-ID on.

    Raises ApiError.
    """
    gateway, asker = gateway_of(request), asker_of(request, endpoint)
    event_id = request.headers.get("last-event-id", "")
    after = positions_in(event_id, request_id, event_id.count(".") + 1) if event_id else ()
    recipe, generation = await follow(gateway, request_id, asker, after)
    if after and len(after) != recipe.num_choices:
        await generation.close()
        positions_in(event_id, request_id, recipe.num_choices)
    return stream(Answer(gateway, recipe, generation, {}, after))


async def cancelled(request: Request, request_id: str, endpoint: Endpoint) -> Response:
    """Raises ApiError."""
    await cancel(gateway_of(request), request_id, asker_of(request, endpoint))
    return json_response({"id": request_id, "object": f"{endpoint.name}.deleted", "deleted": True})


async def _answer(request: Request, gateway: Gateway, client: ClientContext, endpoint: Endpoint) -> Response:
    if gateway.is_draining:
        raise Unavailable("the gateway is shutting down", code="shutting_down", retry_after_s=1.0)
    body = await read_body(request, gateway.settings.max_body_bytes)
    claim = _claim(request, client, body)
    try:
        fleet = await gateway.fleet()
    except BrokerError as error:
        raise from_broker(error) from error
    plan = await endpoint.make_plan(body, gateway, fleet.model, client)
    identity = Identity(plan.request_id, gateway.model.name, int(plan.arrival_s), fleet.fingerprint, plan.service_tier)
    recipe = Recipe.of(endpoint.name, client.tenant, plan, identity)
    key, span = _key_of(request), _span_of(request)
    if span is not None:
        span.describe(plan, gateway.model.name)
    terms = Terms(encode_recipe(recipe), claim, key.quota if key else None, 1, plan.prompt_tokens)
    try:
        generation = await Generation.start(plan, gateway, terms, span)
    except AlreadyClaimed as error:
        recipe, generation = await _repeat(request, gateway, endpoint, claim, error)
    if span is not None:
        span.on_answer(recipe.identity.request_id)
    headers = {**_ignored_header(plan), **rate_limit_headers(generation.quota_levels)}
    return endpoint.respond(Answer(gateway, recipe, generation, headers))


async def _repeat(
    request: Request, gateway: Gateway, endpoint: Endpoint, claim: Claim | None, holder: AlreadyClaimed
) -> tuple[Recipe, Generation]:
    if claim is None or claim.fingerprint != holder.fingerprint:
        message = "this Idempotency-Key was used before, for another request"
        raise IdempotencyConflict(message, param="idempotency-key")
    return await follow(gateway, holder.request_id, asker_of(request, endpoint))


def _claim(request: Request, client: ClientContext, body: bytes) -> Claim | None:
    """Of one client; for one body and URL. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("idempotency-key: should be 1 to 255 ASCII characters", param="idempotency-key")
    name = hashlib.sha256(f"{client.tenant}\n{key}".encode()).hexdigest()
    return Claim(name, hashlib.sha256(request.url.path.encode() + b"\n" + body).hexdigest())


def _key_of(request: Request) -> ApiKey | None:
    key: ApiKey | None = request.scope.get(API_KEY)
    return key


def _span_of(request: Request) -> RequestSpan | None:
    """None where tracing is off."""
    span: RequestSpan | None = request.scope.get(REQUEST_SPAN)
    return span


def asker_of(request: Request, endpoint: Endpoint) -> Asker:
    key = _key_of(request)
    return Asker(endpoint.name, key.name if key else "")


def _client_context(request: Request, gateway: Gateway, request_id: str, arrival_s: float) -> ClientContext:
    key, span = _key_of(request), _span_of(request)
    tenant = key.name if key else ""
    return ClientContext(
        request_id=request_id,
        arrival_s=arrival_s,
        deadline_s=_time_limit(request, "x-nibble-timeout-ms", arrival_s),
        first_token_by_s=_time_limit(request, "x-nibble-ttft-timeout-ms", arrival_s),
        tenant=tenant,
        priority=key.priority if key else 0,
        default_max_tokens=gateway.settings.default_max_tokens,
        cache_scope=tenant if gateway.settings.cache_per_key else "",
        traceparent="" if span is None else span.traceparent,
    )


def _time_limit(request: Request, header: str, arrival_s: float) -> float | None:
    value = request.headers.get(header)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and 1 <= int(value[:20]) <= _MAX_TIMEOUT_MS):
        raise InvalidRequest(f"{header}: should be an integer from 1 to {_MAX_TIMEOUT_MS}", param=header)
    return arrival_s + int(value) / 1e3


def _ignored_header(plan: Plan) -> Mapping[str, str]:
    if not plan.ignored:
        return {}
    names = ignored_header(plan.ignored)
    logger.info("request_id=%s ignored=%s", plan.request_id, names)
    return {"x-nibble-ignored": names}
