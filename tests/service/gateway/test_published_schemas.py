"""Every kind of answer and event against the published documents' schemas."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from conftest import RunningGateway
from published_schemas import OPEN_RESPONSES, OPENAI, errors

USER = [{"role": "user", "content": "The quick brown fox"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CHATS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"logprobs": True, "top_logprobs": 2},
    {"max_tokens": 2},
    {"stop": "quick"},
    {"service_tier": "flex"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
]
RESPONSE = {OPENAI: "Response", OPEN_RESPONSES: "ResponseResource"}
RESPONSES: list[dict[str, Any]] = [
    {},
    {"max_output_tokens": 2},
    {"top_logprobs": 2},
    {"metadata": {"a": "b"}, "instructions": "be kind", "temperature": 0.5},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "user": "u"},
]


def post(running: RunningGateway, path: str, body: dict[str, Any]) -> httpx.Response:
    response = httpx.post(f"{running.url}/v1/{path}", json={"model": "small", **body}, timeout=30)
    assert response.status_code == 200, response.text
    return response


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("fields", CHATS)
def test_chat_completion(running: RunningGateway, fields: dict[str, Any]) -> None:
    body = {"messages": USER, **fields}
    assert errors(post(running, "chat/completions", body).json(), OPENAI, "CreateChatCompletionResponse") == []
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in events_of(post(running, "chat/completions", streamed)):
        assert errors(chunk, OPENAI, "CreateChatCompletionStreamResponse") == []


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": 2}, {"echo": True, "logprobs": 1}])
def test_completion(running: RunningGateway, fields: dict[str, Any]) -> None:
    tokens = running.gateway.model.encode("one two")
    running.worker.reply = lambda request: [*tokens, running.end_of_turn]
    body = {"prompt": "x", **fields}
    assert errors(post(running, "completions", body).json(), OPENAI, "CreateCompletionResponse") == []
    for chunk in events_of(post(running, "completions", {**body, "stream": True})):
        assert errors(chunk, OPENAI, "CreateCompletionResponse") == []


@pytest.mark.parametrize("fields", RESPONSES)
@pytest.mark.parametrize("document", [OPENAI, OPEN_RESPONSES])
def test_response(running: RunningGateway, document: str, fields: dict[str, Any]) -> None:
    body = {"input": "The quick brown fox", **fields}
    if document == OPEN_RESPONSES and "text" in fields:
        pytest.skip("this document has no schema in text.format but null")
    schema = RESPONSE[document]
    created = post(running, "responses", body).json()
    assert errors(created, document, schema) == []
    assert errors(httpx.get(f"{running.url}/v1/responses/{created['id']}").json(), document, schema) == []
    for event in events_of(post(running, "responses", {**body, "stream": True})):
        assert errors(event, document, event_schema(event["type"], document)) == []


def event_schema(kind: str, document: str) -> str:
    """response.output_text.delta -> ResponseTextDeltaEvent or ResponseOutputTextDeltaStreamingEvent."""
    name = "".join(part.capitalize() for part in kind.replace("_", ".").split("."))
    if document == OPEN_RESPONSES:
        return f"{name}StreamingEvent"
    return name.replace("OutputText", "Text") + "Event"


@pytest.mark.parametrize("document", [OPENAI, OPEN_RESPONSES])
def test_response_with_calls(running: RunningGateway, document: str) -> None:
    running.reply_with('{"name": "now", "arguments": {"a": 1}}')
    tool = {"type": "function", "name": "now", "parameters": {"type": "object"}}
    body = {"input": "x", "tools": [tool]}
    assert errors(post(running, "responses", body).json(), document, RESPONSE[document]) == []
    for event in events_of(post(running, "responses", {**body, "stream": True})):
        assert errors(event, document, event_schema(event["type"], document)) == []


def test_lists_and_errors(running: RunningGateway) -> None:
    created = post(running, "responses", {"input": "x"}).json()
    items = httpx.get(f"{running.url}/v1/responses/{created['id']}/input_items").json()
    assert errors(items, OPENAI, "ResponseItemList") == []
    assert errors(httpx.get(f"{running.url}/v1/models").json(), OPENAI, "ListModelsResponse") == []
    assert errors(httpx.get(f"{running.url}/v1/models/small").json(), OPENAI, "Model") == []
    for body in ({}, {"messages": USER, "n": 0}):
        failed = httpx.post(f"{running.url}/v1/chat/completions", json=body).json()
        assert errors(failed, OPENAI, "ErrorResponse") == []


def test_a_wrong_answer_is_noticed() -> None:
    """The validation itself."""
    assert errors({"id": 5}, OPENAI, "Model")
    assert errors({}, OPEN_RESPONSES, "ResponseResource")
