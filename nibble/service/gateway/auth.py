"""API keys: who may call, as pure ASGI.

Keys are compared as SHA-256 digests in constant time. The digest's first characters name the key's tenant, so that
requests of one key share one place in the queue's fairness, and no log or message ever holds a key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nibble.service.gateway.errors import InvalidApiKey

TENANT = "nibble.tenant"  # scope key: the tenant of the API key, absent without keys
_TENANT_CHARS = 12
_OPEN_PATHS = frozenset({"/health", "/ready"})
_METRICS_PATH = "/metrics"


class ApiKeyMiddleware:
    """Passes on only requests with a known key, and those to open paths. No keys: everything passes."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], metrics_public: bool) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]
        self._open_paths = _OPEN_PATHS | {_METRICS_PATH} if metrics_public else _OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        if sum(hmac.compare_digest(digest, known) for known in self._digests):  # no early exit
            scope[TENANT] = digest.hex()[:_TENANT_CHARS]
            await self._app(scope, receive, send)
            return
        what = "the API key is not valid" if key else "an API key is needed: send the header Authorization: Bearer KEY"
        error = InvalidApiKey(what)
        headers = {"www-authenticate": "Bearer"}
        await Response(error.body(), error.status, headers, "application/json")(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
