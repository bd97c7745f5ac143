"""POST /v1/chat/completions, and DELETE /v1/chat/completions/{id} to cancel one."""

from __future__ import annotations

import itertools

import orjson
from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.engine.protocol import FinishReason
from nibble.service.broker.errors import BrokerError, UnknownRequest
from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.errors import from_broker, from_validation
from nibble.service.gateway.plan import ClientContext, Plan, choice_request_id
from nibble.service.gateway.routes.answer import answer
from nibble.service.gateway.routes.body import body_schema, gateway_of
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.shapes import ChatShape

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, whole or as server-sent events."""
    return await answer(request, "chatcmpl", _plan, ChatShape)


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
    deleted = {"id": request_id, "object": "chat.completion.deleted", "deleted": True}
    return Response(orjson.dumps(deleted), media_type="application/json")


async def _plan(body: bytes, model: ServedModel, client: ClientContext) -> Plan:
    try:
        chat_request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    return await to_generation_requests(chat_request, model, client)
