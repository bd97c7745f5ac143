"""The x-ratelimit headers: how far the limits of a key are used. Source: OpenAI's guide to rate limits."""

from __future__ import annotations

from collections.abc import Sequence

from nibble.service.broker.terms import Level


def rate_limit_headers(levels: Sequence[Level]) -> dict[str, str]:
    """Of several limits of one unit, the one that is used up first."""
    headers: dict[str, str] = {}
    for level in sorted(levels, key=lambda level: level.remaining, reverse=True):
        unit = level.limit.unit
        headers[f"x-ratelimit-limit-{unit}"] = str(level.limit.amount)
        headers[f"x-ratelimit-remaining-{unit}"] = str(level.remaining)
        headers[f"x-ratelimit-reset-{unit}"] = f"{level.reset_s:.3f}s"
    return headers
