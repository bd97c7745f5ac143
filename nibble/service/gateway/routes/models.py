"""GET /v1/models and /v1/models/{id}: the one model that this deployment serves."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nibble.service.broker.errors import BrokerError
from nibble.service.gateway.errors import model_not_found
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.routes.body import gateway_of, json_response

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models that can be named in a request."""
    models = [await _model_object(gateway_of(request))]
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> Response:
    """Describe one model."""
    gateway = gateway_of(request)
    if model != gateway.model.name:
        raise model_not_found(model)
    return json_response(await _model_object(gateway))


async def _model_object(gateway: Gateway) -> dict[str, Any]:
    try:
        model = (await gateway.fleet()).model
    except BrokerError:  # nobody is served now, but the model is what it is
        model = gateway.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "nibble",
        "max_model_len": model.context_length,  # not OpenAI's, but read by many clients
    }
