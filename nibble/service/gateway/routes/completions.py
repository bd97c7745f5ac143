"""POST /v1/completions: plain text, continued."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from nibble.service.gateway.errors import from_validation
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.routes.answer import answer
from nibble.service.gateway.routes.body import body_schema
from nibble.service.gateway.schema.text import CompletionRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.shapes import TextShape
from nibble.service.gateway.text import to_text_plan

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue one or several texts, whole or as server-sent events."""
    return await answer(request, "cmpl", _plan, TextShape)


async def _plan(body: bytes, model: ServedModel, client: ClientContext) -> Plan:
    try:
        text_request = CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    return await to_text_plan(text_request, model, client)
