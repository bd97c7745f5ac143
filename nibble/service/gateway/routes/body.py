"""What routes with a JSON body share: reading it with a limit, and its schema for the OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import orjson
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nibble.service.gateway.errors import BodyTooLarge, BodyTooSlow, Cancelled, InvalidRequest, shown
from nibble.service.gateway.gateway import Gateway

PART_S = 30.0  # between two parts of a body
SCHEMA_REF = "#/components/schemas/{model}"


def gateway_of(request: Request) -> Gateway:
    """The Gateway that app.py put into the application's state."""
    return cast(Gateway, request.app.state.gateway)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises BodyTooLarge as soon as the limit is passed, before reading when the client says the length; BodyTooSlow,
    Cancelled where the client leaves, InvalidRequest for an encoding."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"content-encoding: bodies are taken as they are (got {shown(encoding)})"
        raise InvalidRequest(message, param="content-encoding")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(f"{length} bytes", max_bytes)
    body = bytearray()
    parts = request.stream()
    try:
        while True:
            async with asyncio.timeout(PART_S):
                part = await anext(parts, b"")
            if not part:
                break
            body += part
            if len(body) > max_bytes:
                raise _too_large(f"more than {max_bytes} bytes", max_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"nothing of the body came for {PART_S:g} s") from None
    except ClientDisconnect:
        raise Cancelled("the client closed the connection", code="client_disconnected") from None
    return bytes(body)


def _too_large(size: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size}, the limit is {max_bytes}")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def body_schema(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that validates its body itself; app.py adds the components it refers to."""
    references = [{"$ref": SCHEMA_REF.format(model=model.__name__)} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
