"""A body of some megabytes takes no time that other clients would miss: none of their streams goes on meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nibble.service.gateway.errors import from_validation
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.responses import ResponseRequest
from nibble.service.gateway.schema.sampling import MAX_ITEMS
from nibble.service.gateway.schema.text import CompletionRequest
from nibble.service.gateway.schema.tokenization import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest

BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    ResponseRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    DetokenizeRequest,
)
NUM_BYTES = 2 << 20
MAX_CPU_S = 3.0  # mostly much less; without limits some took more than 5


@pytest.mark.parametrize("body", BODIES)
def test_every_list_and_mapping_of_values_has_a_limit(body: type[BaseModel]) -> None:
    document = body.model_json_schema()
    for schema in schemas_in(document):
        if schema.get("type") == "array":
            assert "maxItems" in schema, schema
    for model in (body, *(kind for kind in BODIES if issubclass(body, kind))):
        for name, value in (("logit_bias", 1.0), ("metadata", "x")):
            if name not in model.model_fields:
                continue
            with pytest.raises(ValidationError) as caught:
                model.model_validate({name: {str(i): [value] for i in range(MAX_ITEMS + 1)}})
            of_field = [error for error in caught.value.errors() if error["loc"][0] == name]
            assert [error["type"] for error in of_field] == ["value_error"]


def schemas_in(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from schemas_in(child)
    elif isinstance(node, list):
        for child in node:
            yield from schemas_in(child)


def filled(head: str, item: str, tail: str) -> bytes:
    num_items = (NUM_BYTES - len(head) - len(tail)) // (len(item) + 1)
    return f"{head}{','.join([item] * num_items)}{tail}".encode()


@pytest.mark.parametrize(
    ("body", "head", "item", "tail"),
    [
        (CompletionRequest, '{"prompt":[', "1", "]}"),
        (CompletionRequest, '{"prompt":[', "-1", "]}"),
        (CompletionRequest, '{"prompt":[', '"a",1', "]}"),
        (CompletionRequest, '{"prompt":[[', "-1", "]]}"),
        (CompletionRequest, '{"stop_token_ids":[', '"a"', "]}"),
        (ChatCompletionRequest, '{"messages":[', "{}", "]}"),
        (ChatCompletionRequest, '{"messages":[', '{"role":"user","content":"a"}', "]}"),
        (ChatCompletionRequest, '{"messages":[{"role":"user","content":[', "{}", "]}]}"),
        (ChatCompletionRequest, '{"messages":[{"role":"user","tool_calls":[', "{}", "]}]}"),
        (ChatCompletionRequest, '{"messages":[],"tools":[', "{}", "]}"),
        (ResponseRequest, '{"input":[', "{}", "]}"),
        (ResponseRequest, '{"input":[{"content":[', "{}", "]}]}"),
        (ResponseRequest, '{"input":[],"tools":[', "{}", "]}"),
        (DetokenizeRequest, '{"tokens":[', "-1", "]}"),
    ],
)
def test_wrong_or_endless_lists_are_refused_soon(body: type[BaseModel], head: str, item: str, tail: str) -> None:
    text = filled(head, item, tail)
    begin_s = time.process_time()
    with pytest.raises(ValidationError) as caught:
        body.model_validate_json(text)
    error = from_validation(caught.value)
    assert time.process_time() - begin_s < MAX_CPU_S
    assert error.param
    assert len(error.message) < 500
