"""Who is served first: the one place that decides between requests.

A request is served as if it had come PRIORITY_S later for each step of its priority number: whoever comes later than
that is behind it, so nobody waits for ever. A rank is computed once, when a request is queued, and kept through
preemptions.

Another function of the same type may be given to the scheduler (fairness between tenants: the virtual time at which
the tenant's share pays for the request, for example). It may have state, and must give no rank twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from nibble.engine.protocol import PRIORITY_S, GenerationRequest

Rank: TypeAlias = tuple[float | str, ...]  # the lowest is served first
ServiceOrder: TypeAlias = Callable[[GenerationRequest], Rank]


def aged_priority(request: GenerationRequest) -> Rank:
    """By priority and arrival; the id only makes it unique."""
    return (request.arrival_s + PRIORITY_S * request.priority, request.request_id)
