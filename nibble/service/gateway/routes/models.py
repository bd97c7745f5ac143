"""GET /v1/models and /v1/models/{id}: the one model that this deployment serves."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from nibble.service.gateway.errors import model_not_found
from nibble.service.gateway.routes.body import gateway_of
from nibble.service.gateway.served_model import ServedModel

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models that can be named in a request."""
    models = [_model_object(gateway_of(request).model)]
    return _json({"object": "list", "data": models})


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> Response:
    """Describe one model."""
    served = gateway_of(request).model
    if model != served.name:
        raise model_not_found(model)
    return _json(_model_object(served))


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "nibble",
        "max_model_len": model.context_length,  # not OpenAI's, but read by many clients
    }


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
