"""Which fields of a request are rejected or reported. All others of the schemas are honoured.

Rejected: the field would change the answer and is not supported yet. Reported: the answer is right without it, but
the client should know; its name goes into the response header `x-nibble-ignored`. A neutral value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from nibble.service.gateway.errors import InvalidRequest
from nibble.service.gateway.schema.sampling import SamplingBody

_MAX_REPORTED = 32  # names in the header; proxies limit the size of headers

# field -> is this (non-null) value neutral
REJECTED: Mapping[str, Callable[[Any], bool]] = {
    "functions": lambda value: not value,
    "function_call": lambda value: value == "none",
    "modalities": lambda value: value in ([], ["text"]),
    "audio": lambda value: not value,
    "web_search_options": lambda value: False,  # {} asks for a search with default options
    "moderation": lambda value: not value,
    "suffix": lambda value: not value,
}

_SUCCESSORS = {"functions": "tools", "function_call": "tool_choice"}

REPORTED = (
    "verbosity",
    "prediction",
    "prompt_cache_retention",
    "prompt_cache_options",
    "metadata",
    "store",
)


def check_supported(request: SamplingBody) -> None:
    """Raise InvalidRequest for the first field whose value asks for what is not supported yet."""
    for field, is_neutral in REJECTED.items():
        value = _known(request, field)
        if value is not None and not is_neutral(value):
            successor = _SUCCESSORS.get(field)
            message = f"{field} is not supported; send {successor}" if successor else f"{field} is not supported yet"
            raise InvalidRequest(message, param=field, code="unsupported_parameter")


def ignored_fields(request: SamplingBody) -> tuple[str, ...]:
    """Names of the fields that were sent and have no effect, unknown ones included."""
    known = [field for field in REPORTED if _known(request, field)]
    unknown = set_extras(request.model_extra)
    options = request.stream_options
    nested = [f"stream_options.{name}" for name in set_extras(options.model_extra)] if options else []
    return tuple([*known, *unknown, *nested, *_ignored_description(request)])


def ignored_header(fields: tuple[str, ...]) -> str:
    """The value of x-nibble-ignored; names are the client's and may hold anything, so they are percent-encoded."""
    names = [quote(field[:64]) for field in fields[:_MAX_REPORTED]]
    return ",".join([*names, "..."] if len(fields) > _MAX_REPORTED else names)


def _ignored_description(request: SamplingBody) -> list[str]:
    """A schema's description is meant for the model, whose prompt is made of the messages alone."""
    schema = request.response_format.json_schema if request.response_format else None
    return ["response_format.json_schema.description"] if schema and schema.description else []


def _known(request: SamplingBody, field: str) -> Any:
    """Its value, if this endpoint has such a field; unknown ones are attributes too."""
    return getattr(request, field) if field in type(request).model_fields else None


def set_extras(extra: Mapping[str, Any] | None) -> list[str]:
    """Names of the unknown fields of a body that were set."""
    return [name for name, value in (extra or {}).items() if value is not None]
