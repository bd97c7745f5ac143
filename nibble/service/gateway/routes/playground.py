"""GET /: a page to try the model in a browser. One static file without external hosts; it uses the public API alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_FILE = Path(__file__).parents[1] / "static" / "playground.html"
# The page runs its own inline script and talks to this host: whatever a model writes, nothing else can be loaded.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_HEADERS = {
    "content-security-policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/")
async def playground() -> Response:
    """The page."""
    return Response(_page(), media_type="text/html; charset=utf-8", headers=_HEADERS)


@cache
def _page() -> bytes:
    return _FILE.read_bytes()
