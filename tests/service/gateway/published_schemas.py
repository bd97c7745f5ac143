"""OpenAI's OpenAPI document and that of Open Responses, as the package `llm-comply` ships them, for validation."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

OPENAI, OPEN_RESPONSES = "openai_chat", "openresponses"
_CHOICE = "CreateCompletionResponse/properties/choices/items/properties"
# What is null in OpenAI's own answers, but not in its document: chunks before the last one, the logprob of the first
# token of an echoed prompt, the usage of a response that is being generated.
_NULL_TOO = (
    f"{_CHOICE}/finish_reason",
    f"{_CHOICE}/logprobs/properties/token_logprobs/items",
    f"{_CHOICE}/logprobs/properties/top_logprobs/items",
    "Response/allOf/2/properties/usage",
)


def errors(value: Any, document: str, schema: str) -> list[str]:
    """What is wrong with a value that should be an instance of a document's schema."""
    found = _validator(document, schema).iter_errors(value)
    return [f"{error.json_path}: {error.message}" for error in found]


@cache
def _validator(document: str, schema: str) -> Draft202012Validator:
    contents = _document(document)
    assert schema in contents["components"]["schemas"], f"{document} has no {schema}"
    registry = Registry().with_resource(f"urn:{document}", Resource(contents, DRAFT202012))
    return Draft202012Validator({"$ref": f"urn:{document}#/components/schemas/{schema}"}, registry=registry)


@cache
def _document(name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((files("llm_comply") / "specs" / f"{name}.json").read_text())
    if name == OPENAI:
        for path in _NULL_TOO:
            *parents, last = path.split("/")
            node = contents["components"]["schemas"]
            for part in parents:
                node = node[int(part) if isinstance(node, list) else part]
            node[last] = {"anyOf": [{"type": "null"}, node[last]]}
    _translate(contents["components"])
    return contents


def _translate(node: Any) -> None:
    """OpenAPI 3.0's `nullable` into JSON Schema."""
    if isinstance(node, list):
        for part in node:
            _translate(part)
    elif isinstance(node, dict):
        for part in node.values():
            _translate(part)
        if node.get("nullable") is True and len(node) > 1:
            del node["nullable"]
            kept = dict(node)
            node.clear()
            node["anyOf"] = [{"type": "null"}, kept]
