"""Who may call, as pure ASGI. No log and no message ever holds a key.

A key comes as a bearer token, or as the password of HTTP Basic: a browser asks for that before it shows the page at /.
"""

from __future__ import annotations

import base64
import binascii

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nibble.service.gateway.api_keys import KeyRing
from nibble.service.gateway.errors import InvalidApiKey

API_KEY = "nibble.api_key"  # scope key: the ApiKey of the request, absent where none is asked for
_OPEN_PATHS = frozenset({"/health", "/ready"})
_METRICS_PATH = "/metrics"


class ApiKeyMiddleware:
    """Passes on only requests with a known key, and those to open paths. No keys: everything passes."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, metrics_public: bool) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = _OPEN_PATHS | {_METRICS_PATH} if metrics_public else _OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._keys.is_empty or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = _key_in(Headers(scope=scope).get("authorization", ""))
        found = self._keys.find(key) if key else None
        if found is not None:
            scope[API_KEY] = found
            await self._app(scope, receive, send)
            return
        is_page = scope["path"] == "/"
        what = "the API key is not valid" if key else "an API key is needed: send the header Authorization: Bearer KEY"
        error = InvalidApiKey(what)
        headers = {"www-authenticate": 'Basic realm="Nibble: the API key is the password"' if is_page else "Bearer"}
        await Response(error.body(), error.status, headers, "application/json")(scope, receive, send)


def _key_in(authorization: str) -> str:
    """Empty: there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
