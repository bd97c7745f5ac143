"""POST /v1/chat/completions, and by its id: DELETE to cancel one, GET .../stream to resume one."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.errors import from_validation
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.routes import chunked
from nibble.service.gateway.routes.answer import Endpoint, answer, cancelled, resumed
from nibble.service.gateway.routes.body import body_schema
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.shapes import ChatShape

router = APIRouter(tags=["chat"])


async def _plan(body: bytes, gateway: Gateway, model: ServedModel, client: ClientContext) -> Plan:
    try:
        chat_request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    return await to_generation_requests(chat_request, model, client)


_CHAT = Endpoint("chat.completion", "chatcmpl-", _plan, chunked.respond(ChatShape))


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, whole or as server-sent events."""
    return await answer(request, _CHAT)


@router.get("/v1/chat/completions/{request_id}/stream")
async def resume_chat_completion(request_id: str, request: Request) -> Response:
    """The events after the header Last-Event-ID, of a chat completion that runs or ended not long ago."""
    return await resumed(request, request_id, _CHAT, chunked.stream(ChatShape))


@router.delete("/v1/chat/completions/{request_id}")
async def cancel_chat_completion(request_id: str, request: Request) -> Response:
    """End a running chat completion; its client is told so. The request may run behind another gateway."""
    return await cancelled(request, request_id, _CHAT)
