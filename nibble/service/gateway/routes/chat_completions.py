"""POST /v1/chat/completions, and DELETE /v1/chat/completions/{id} to cancel one."""

from __future__ import annotations

import itertools
import logging
import secrets
import time

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.engine.protocol import FinishReason
from nibble.service.broker.errors import BrokerError, UnknownRequest
from nibble.service.gateway.auth import TENANT
from nibble.service.gateway.chat import ChatPlan, ClientContext, choice_request_id, to_generation_requests
from nibble.service.gateway.completion import Identity
from nibble.service.gateway.errors import ApiError, InvalidRequest, Unavailable, from_broker, from_validation
from nibble.service.gateway.field_support import ignored_header
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.generation import Generation
from nibble.service.gateway.responses import CompletionResponse, StreamResponse
from nibble.service.gateway.routes.body import body_schema, gateway_of, read_body
from nibble.service.gateway.schema.chat import ChatCompletionRequest

logger = logging.getLogger(__name__)
router = APIRouter(tags=["chat"])

_MAX_TIMEOUT_MS = 24 * 3600 * 1000


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, whole or as server-sent events."""
    gateway = gateway_of(request)
    request_id = f"chatcmpl-{secrets.token_hex(16)}"
    arrival_s = time.time()
    try:
        return await _answer(request, gateway, request_id, arrival_s)
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


@router.delete("/v1/chat/completions/{request_id}")
async def cancel_chat_completion(request_id: str, request: Request) -> Response:
    """End a running chat completion; its client is told so. The request may run behind another gateway."""
    broker = gateway_of(request).broker
    try:
        for choice in itertools.count():
            name = choice_request_id(request_id, choice)
            (await broker.attach(name)).close()
            await broker.abort(name, FinishReason.ABORT)
    except BrokerError as error:
        if not (isinstance(error, UnknownRequest) and choice):
            raise from_broker(error) from error
    answer = {"id": request_id, "object": "chat.completion.deleted", "deleted": True}
    return Response(orjson.dumps(answer), media_type="application/json")


async def _answer(request: Request, gateway: Gateway, request_id: str, arrival_s: float) -> Response:
    if gateway.is_draining:
        raise Unavailable("the gateway is shutting down", code="shutting_down", retry_after_s=1.0)
    body = await read_body(request, gateway.settings.max_body_bytes)
    try:
        chat_request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    client = _client_context(request, gateway, request_id, arrival_s)
    try:
        fleet = await gateway.fleet()
    except BrokerError as error:
        raise from_broker(error) from error
    plan = await to_generation_requests(chat_request, fleet.model, client)
    headers = _headers(plan)
    identity = Identity(request_id, gateway.model.name, int(arrival_s), fleet.fingerprint, plan.service_tier)
    generation = await Generation.start(plan, gateway)
    if plan.stream:
        return StreamResponse(generation, identity, headers, gateway.settings.keep_alive_s)
    return CompletionResponse(generation, identity, headers)


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


def _headers(plan: ChatPlan) -> dict[str, str]:
    if not plan.ignored:
        return {}
    names = ignored_header(plan.ignored)
    logger.info("request_id=%s ignored=%s", plan.request_id, names)
    return {"x-nibble-ignored": names}
