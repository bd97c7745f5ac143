"""Writes the table of all request fields in api.md from the schemas: `python docs/field_table.py` (`make docs`)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from nibble.service.gateway import field_support, response_request
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.responses import ResponseRequest
from nibble.service.gateway.schema.sampling import Body
from nibble.service.gateway.schema.text import CompletionRequest

PAGE = Path(__file__).with_name("api.md")
BEGIN, END = "<!-- written by field_table.py -->\n", "<!-- end -->\n"
_LIMITS = (
    ("minimum", "at least {}"),
    ("exclusiveMinimum", "above {}"),
    ("maximum", "at most {}"),
    ("maxLength", "at most {} characters"),
    ("maxItems", "at most {} items"),
    ("maxProperties", "at most {} members"),
)


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return before + BEGIN + "\n".join(_table()) + "\n" + END + rest.partition(END)[2]


def _table() -> Iterator[str]:
    endpoints = [
        _supported(ChatCompletionRequest, field_support.REJECTED, field_support.REPORTED),
        _supported(CompletionRequest, field_support.REJECTED, field_support.REPORTED),
        _supported(ResponseRequest, response_request.REJECTED, response_request.REPORTED),
    ]
    values: dict[str, list[str]] = {}
    for body in (ChatCompletionRequest, CompletionRequest, ResponseRequest):
        for field, value in _values(body).items():
            values.setdefault(field, []).append(value)
    yield "| field | values | chat | text | responses |"
    yield "| --- | --- | --- | --- | --- |"
    for field in sorted(values):
        yield (
            f"| `{field}` | {'; '.join(dict.fromkeys(values[field]))} | "
            + " | ".join(fields.get(field, "") for fields in endpoints)
            + " |"
        )


def _supported(body: type[Body], rejected: Collection[str], reported: Collection[str]) -> dict[str, str]:
    return {
        field: "rejected" if field in rejected else "reported" if field in reported else "honoured"
        for field in body.model_fields
    }


def _values(body: type[Body]) -> dict[str, str]:
    """Field -> what may be in it."""
    schema = body.model_json_schema()
    return {field: _described(value, schema["$defs"]) for field, value in schema["properties"].items()}


def _described(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_described(kind, definitions) for kind in schema["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in schema:
        return _described(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    limits = [text.format(schema[name]) for name, text in _LIMITS if name in schema]
    return " ".join([schema.get("type", "any"), *([f"({', '.join(limits)})"] if limits else [])])


if __name__ == "__main__":
    PAGE.write_text(page())
