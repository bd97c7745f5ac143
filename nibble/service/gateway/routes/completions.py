"""POST /v1/completions: plain text, continued; by its id DELETE to cancel one, GET .../stream to resume one."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.service.gateway.errors import from_validation
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.routes import chunked
from nibble.service.gateway.routes.answer import Endpoint, answer, cancelled, resumed
from nibble.service.gateway.routes.body import body_schema
from nibble.service.gateway.schema.text import CompletionRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.shapes import TextShape
from nibble.service.gateway.text import to_text_plan

router = APIRouter(tags=["completions"])


async def _plan(body: bytes, gateway: Gateway, model: ServedModel, client: ClientContext) -> Plan:
    try:
        text_request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    return await to_text_plan(text_request, model, client)


_TEXT = Endpoint("text_completion", "cmpl-", _plan, chunked.respond(TextShape))


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one or several texts, whole or as server-sent events."""
    return await answer(request, _TEXT)


@router.get("/v1/completions/{request_id}/stream")
async def resume_completion(request_id: str, request: Request) -> Response:
    """The events after the header Last-Event-ID, of a completion that runs or ended not long ago."""
    return await resumed(request, request_id, _TEXT, chunked.stream(TextShape))


@router.delete("/v1/completions/{request_id}")
async def cancel_completion(request_id: str, request: Request) -> Response:
    """End a running completion; its client is told so. The request may run behind another gateway."""
    return await cancelled(request, request_id, _TEXT)
