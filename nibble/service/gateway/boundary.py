"""The outermost ASGI layer: gives each request an id, counts responses, and lets no exception pass.

`x-request-id` is echoed, or made. An exception that comes through is a bug: it is logged with its traceback and, if
nothing was sent yet, answered with a 500 in the usual shape.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nibble.service.gateway.errors import ServerFault

logger = logging.getLogger(__name__)

SERVER_SEND = "nibble.send"  # scope key: the server's own `send`, for body messages that no layer looks at
REQUEST_SPAN = "nibble.span"  # scope key: the RequestSpan of a request for text, where tracing is on
_ECHOED = re.compile(r"[\x21-\x7e]{1,128}")  # anything else is not repeated into headers and logs


class Boundary:
    """Wraps the application. `responses` counts by HTTP status."""

    def __init__(self, app: ASGIApp, responses: Counter[int]) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if _ECHOED.fullmatch(sent_id) else f"req-{secrets.token_hex(16)}"
        is_started = False
        scope[SERVER_SEND] = send

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                self._responses[message["status"]] += 1
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("x_request_id=%s failed", request_id)
            if not is_started:
                error = ServerFault("internal error; the log of the gateway has its cause")
                await Response(error.body(), 500, media_type="application/json")(scope, receive, send_with_id)
