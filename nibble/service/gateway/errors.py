"""Everything a client can be told, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, always all four.

    ApiError
    ├── InvalidRequest            400  the request is at fault; `param` names the field
    │   └── ContextLengthExceeded 400  code context_length_exceeded
    ├── InvalidApiKey             401
    ├── NotFound                  404  unknown model (model_not_found), request id or URL
    ├── MethodNotAllowed          405
    ├── BodyTooSlow               408
    ├── BodyTooLarge              413
    ├── IdempotencyConflict       422  an Idempotency-Key was used before, for something else
    ├── Overloaded                429  the queue is full, or a key's limit is reached; with Retry-After
    ├── Cancelled                 499  someone asked for the request to be cancelled
    ├── ServerFault               500  a bug here, or a worker failed the request
    ├── Unavailable               503  no worker, no broker, or shutting down; with Retry-After
    └── DeadlineExceeded          504

Official SDKs retry 408, 409, 429 and 5xx by themselves, and read `retry-after-ms` before `Retry-After`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nibble.engine.protocol import InvalidSampling
from nibble.service.broker.errors import (
    BrokerError,
    BrokerUnavailable,
    NoWorker,
    OverQuota,
    QueueFull,
    UnknownRequest,
)
from nibble.service.gateway.rate_limits import rate_limit_headers

_UNAVAILABLE_RETRY_S = 1.0  # for outages whose end nobody can compute
_API_NAMES = {"bad_words_token_ids": "bad_words"}  # fields of SamplingParams; others have the same name
_MAX_SHOWN_CHARS = 80  # of a value that was sent


class ApiError(Exception):
    """Base class; never raised itself."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.headers: Mapping[str, str] = _retry_headers(retry_after_s) if retry_after_s is not None else {}

    def body(self) -> bytes:
        """The JSON that goes into a response body or an SSE event."""
        return error_body(self.message, self.type, self.param, self.code)


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class InvalidApiKey(ApiError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ApiError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class BodyTooSlow(ApiError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"connection": "close"}  # the rest of the body may still come


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class IdempotencyConflict(ApiError):
    status = 422
    type = "invalid_request_error"
    code = "idempotency_key_reused"


class Overloaded(ApiError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class Cancelled(ApiError):
    status = 499
    type = "invalid_request_error"
    code = "request_cancelled"


class ServerFault(ApiError):
    code = "internal_error"


class Unavailable(ApiError):
    status = 503


class DeadlineExceeded(ApiError):
    status = 504
    code = "deadline_exceeded"


def error_body(message: str, type: str, param: str | None, code: str | None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": type, "param": param, "code": code}})


def model_not_found(model: str) -> NotFound:
    return NotFound(f"the model {shown(model)} does not exist", param="model", code="model_not_found")


def no_token_left(fields: Sequence[str], num_tokens: int) -> InvalidRequest:
    """fields: as `TokenEvent.error_fields`. Another try with the same ones may end better, but only by chance."""
    params = [_API_NAMES.get(field, field) for field in fields if field != "grammar"]
    causes = [*params, *(["the grammar of the text"] if "grammar" in fields else [])]
    place = f"after {num_tokens} tokens" if num_tokens else "at the beginning"
    message = f"{place} there is no token to generate: {' and '.join(causes)} forbid all of them"
    return InvalidRequest(message, param=params[0] if params else None, code="no_token_left")


def invalid_sampling(error: InvalidSampling) -> InvalidRequest:
    return InvalidRequest(str(error), param=_API_NAMES.get(error.field, error.field))


def from_broker(error: BrokerError) -> ApiError:
    """What a client is told when the broker refuses or fails."""
    match error:
        case QueueFull():
            message = f"{error.queued} requests are waiting, the limit is {error.limit}; retry later"
            return Overloaded(message, retry_after_s=error.retry_after_s)
        case OverQuota(limit=limit):
            period = {60: "minute", 86400: "day"}.get(limit.period_s, f"{limit.period_s} s")
            message = f"the limit of this API key is {limit.amount} {limit.unit} per {period}; retry later"
            overloaded = Overloaded(message, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
            overloaded.headers = {**overloaded.headers, **rate_limit_headers(error.levels)}
            return overloaded
        case NoWorker():
            message = "no worker is ready for this model; retry later"
            return Unavailable(message, code="no_worker", retry_after_s=error.retry_after_s)
        case BrokerUnavailable():
            message = "the request queue cannot be reached; retry later"
            return Unavailable(message, code="broker_unavailable", retry_after_s=_UNAVAILABLE_RETRY_S)
        case UnknownRequest():
            return NotFound("no such request, or it ended long ago", code="request_not_found")
        case _:
            return ServerFault(f"the request queue refused the request: {error}")


def from_validation(error: ValidationError) -> InvalidRequest:
    """The first field at fault, named as the client wrote it."""
    first = _most_telling(error.errors(include_url=False))
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not valid JSON: {first['ctx']['error']}")
    param = field_path(first["loc"]) or None
    return InvalidRequest(f"{param or 'the body'}: {_reason(first)}", param=param)


def field_path(location: Sequence[int | str]) -> str:
    """('messages', 0, 'content', 'str') -> messages[0].content: pydantic also names the union branch it tried."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not _UNION_BRANCH.fullmatch(part):
            path += f".{part}" if path else part
    return path


def shown(value: object) -> str:
    """A value that was sent, short enough for a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


_UNION_BRANCH = re.compile(r"str|int|float|bool|(list|dict|literal|constrained-\w+|function-\w+)(\[.*\])?|ToolChoice")


def _most_telling(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """Of the first field's errors (one or more for each branch of a union) the deepest, and not one of a wrong type."""
    path = field_path(errors[0]["loc"])
    same = [error for error in errors if field_path(error["loc"]).startswith(path)]
    return max(same, key=lambda error: (len(field_path(error["loc"])), not error["type"].endswith("_type")))


def _reason(error: ErrorDetails) -> str:
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value: Any = error["input"]
    is_scalar = value is None or isinstance(value, str | int | float | bool)
    return f"{message} (got {shown(value)})" if is_scalar and error["type"] != "missing" else message


def _retry_headers(retry_after_s: float) -> Mapping[str, str]:
    return {"retry-after": str(max(1, math.ceil(retry_after_s))), "retry-after-ms": str(math.ceil(retry_after_s * 1e3))}
