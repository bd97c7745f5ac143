"""What can go wrong between a process and the broker.

BrokerError
├── BrokerUnavailable   Redis cannot be reached or cannot take writes now; trying again later may help
├── Refused             admission said no; carries retry_after_s
│   ├── QueueFull       too many requests wait already
│   ├── NoWorker        no worker is alive to serve it
│   └── OverQuota       its quota is used up
├── AlreadyClaimed      another request has its claim
├── DuplicateRequest    a request with this id exists (running, or finished not long ago)
└── UnknownRequest      no request with this id exists (any more)
"""

from __future__ import annotations

import redis.exceptions

from nibble.service.broker.terms import Level, Limit

# Answers of a server that is up but cannot carry out a write now (full, replica, loading, failing over).
_TRANSIENT_ERRORS = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    OSError,  # builtin TimeoutError and asyncio's are OSErrors too
)
_TRANSIENT_CODES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "LOADING", "BUSY")


class BrokerError(Exception):
    """Base of everything the broker raises."""


class BrokerUnavailable(BrokerError):
    """Redis cannot be reached or refuses writes."""


class Refused(BrokerError):
    """Admission refused the request; retry_after_s is computed from the measured service rate."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """The queue has reached its limit."""

    def __init__(self, queued: int, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{queued} requests are waiting, the limit is {limit}", retry_after_s)
        self.queued = queued
        self.limit = limit


class NoWorker(Refused):
    """No worker is alive."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("no worker is available", retry_after_s)


class OverQuota(Refused):
    """levels: of all limits of the quota; `limit` is the one that is used up."""

    def __init__(self, limit: Limit, levels: tuple[Level, ...], retry_after_s: float) -> None:
        super().__init__(f"the limit is {limit.amount} {limit.unit} in {limit.period_s} s", retry_after_s)
        self.limit = limit
        self.levels = levels


class AlreadyClaimed(BrokerError):
    """request_id: who has the claim; fingerprint: what that one asked for."""

    def __init__(self, request_id: str, fingerprint: str) -> None:
        super().__init__(f"request {request_id} has this claim")
        self.request_id = request_id
        self.fingerprint = fingerprint


class DuplicateRequest(BrokerError):
    """The request id is taken."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} exists already")
        self.request_id = request_id


class UnknownRequest(BrokerError):
    """The request id names nothing."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} is not known (any more)")
        self.request_id = request_id


def translated(error: Exception) -> BrokerError:
    """The BrokerError that stands for an error of redis-py or of the socket below it."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, _TRANSIENT_ERRORS) or str(error).startswith(_TRANSIENT_CODES):
        return BrokerUnavailable(message)
    return BrokerError(message)
