"""The OpenAPI document: FastAPI's, with the schemas of the bodies that routes validate themselves, and of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nibble.service.gateway.routes.body import SCHEMA_REF

_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"
_STREAMING = {
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
    ("post", "/v1/responses"),
    ("get", "/v1/responses/{response_id}"),
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_NOT_READY = {"type": "object", "required": ["status", "model", "reason"]}


def openapi_document(app: FastAPI, bodies: Sequence[type[BaseModel]], model_name: str) -> dict[str, Any]:
    """Every operation can answer with an error; none with FastAPI's own 422. `model` is the served one."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=SCHEMA_REF)
    document.setdefault("components", {})["schemas"] = {**definitions["$defs"], "Error": _ERROR}
    for body in bodies:
        if body.model_fields["model"].is_required():
            definitions["$defs"][body.__name__]["properties"]["model"] = {"type": "string", "enum": [model_name]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(path, method)
    return document


def _responses(path: str, method: str) -> dict[str, Any]:
    schemas: dict[str, dict[str, Any]] = {_JSON: {"type": "object"}}
    if path == "/metrics":
        schemas = {_TEXT: {"type": "string"}}
    elif path.endswith("/stream"):
        schemas = {_EVENTS: {}}
    elif (method, path) in _STREAMING:
        schemas[_EVENTS] = {}
    error = {"description": "An error", "content": {_JSON: {"schema": {"$ref": SCHEMA_REF.format(model="Error")}}}}
    answers = {"200": _content("The answer", schemas), "default": error}
    return {**answers, "503": _content("Not ready", {_JSON: _NOT_READY})} if path == "/ready" else answers


def _content(description: str, schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}
