"""What a gateway asks for beside a request when it submits one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Limit:
    """At most so many requests or tokens in any period, give or take those that are being generated."""

    unit: Literal["requests", "tokens"]
    amount: int
    period_s: int


@dataclass(frozen=True)
class Quota:
    """Limits that all requests of this name share, whichever gateway they came to."""

    name: str
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class Level:
    """How far a limit is used. reset_s: until nothing of it would be."""

    limit: Limit
    remaining: int
    reset_s: float


@dataclass(frozen=True)
class Claim:
    """Of requests with one claim only the first is queued, and a later one if that failed: see AlreadyClaimed.

    fingerprint: hexadecimal, of what was asked for.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Terms:
    """context: handed back to whoever attaches, as it is. num_requests and num_tokens: charged to the quota now; the
    generated tokens are when the request ends, however it does."""

    context: bytes = b""
    claim: Claim | None = None
    quota: Quota | None = None
    num_requests: int = 0
    num_tokens: int = 0
