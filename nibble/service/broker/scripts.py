"""The Lua scripts, and how both sides connect and call them.

A script runs atomically in Redis, which is what makes the token log's promises hold. Scripts are called by their
SHA-1; a server that does not know one (new, or restarted) answers NOSCRIPT before it has done anything, and is then
sent the text. redis-py's own retries are off everywhere: a repeat is only right where the protocol says so.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from redis.backoff import NoBackoff

_DIRECTORY = Path(__file__).parent / "scripts"
_CONNECT_TIMEOUT_S = 1.0


class Script:
    """One script with the common part before it."""

    def __init__(self, name: str) -> None:
        common = (_DIRECTORY / "common.lua").read_bytes()
        self.source = common + (_DIRECTORY / f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


SUBMIT = Script("submit")
READ = Script("read")
ABORT = Script("abort")
STATUS = Script("status")
STORE_RESPONSE = Script("store_response")
READ_RESPONSES = Script("read_responses")
DELETE_RESPONSE = Script("delete_response")
EXCHANGE = Script("exchange")
HAND_BACK = Script("hand_back")
RENEW = Script("renew")


def client_options(retry_class: type[Any], timeout_s: float) -> dict[str, Any]:
    """Arguments for Redis.from_url; retry_class is redis.retry.Retry or its asyncio twin."""
    return {
        "protocol": 2,
        "retry": retry_class(NoBackoff(), 0),
        "socket_connect_timeout": min(_CONNECT_TIMEOUT_S, timeout_s),
        "socket_timeout": timeout_s,
        "socket_keepalive": True,
    }
