"""/v1/responses through a real server, a real broker and the `openai` client: what is created, of which input."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from conftest import RunningGateway
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from responses_client import BODY, TEXT, events_of, post, prompt_of, without_ids


def test_whole_response(running: RunningGateway) -> None:
    response = running.openai().responses.create(**BODY, metadata={"a": "b"}, temperature=0.5)
    assert re.fullmatch("resp_[0-9a-f]{32}", response.id)
    assert (response.object, response.status, response.model, response.output_text) == (
        "response",
        "completed",
        "small",
        TEXT,
    )
    assert (response.metadata, response.temperature, response.top_p) == ({"a": "b"}, 0.5, 1.0)
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert (message.role, message.status) == ("assistant", "completed")
    assert response.usage is not None
    assert response.usage.input_tokens == len(running.worker.seen[-1].prompt_token_ids)
    assert response.usage.output_tokens == len(running.gateway.model.encode(TEXT)) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 2


def test_events_of_a_stream(running: RunningGateway) -> None:
    events = events_of(post(running, {**BODY, "stream": True}).text)
    kinds = [event["type"].removeprefix("response.") for event in events]
    num_deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * num_deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert num_deltas >= 1
    assert "".join(event["delta"] for event in events if "delta" in event) == TEXT == events[-4]["text"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    (item,) = events[-1]["response"]["output"]
    assert item == events[-2]["item"]
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}


@pytest.mark.parametrize("fields", [{}, {"max_output_tokens": 3}, {"top_logprobs": 2, "include": []}])
def test_streamed_response_ends_as_the_whole_one(running: RunningGateway, fields: dict[str, Any]) -> None:
    whole = post(running, {**BODY, **fields}).json()
    streamed = events_of(post(running, {**BODY, **fields, "stream": True}).text)[-1]["response"]
    assert without_ids(streamed) == without_ids(whole)


def test_official_client_streams(running: RunningGateway) -> None:
    with running.openai().responses.stream(**BODY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == TEXT


def test_length_is_incomplete(running: RunningGateway) -> None:
    response = running.openai().responses.create(**BODY, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]


def test_no_text_is_an_empty_text(running: RunningGateway) -> None:
    running.worker.reply = lambda request: [running.end_of_turn]
    response = running.openai().responses.create(**BODY)
    assert (response.output_text, len(response.output)) == ("", 1)


def test_logprobs(running: RunningGateway) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = running.openai().responses.create(**BODY, include=include, top_logprobs=2)
    part = response.output[0].content[0]  # type: ignore[union-attr]
    assert isinstance(part, ResponseOutputText)
    assert part.logprobs is not None
    assert "".join(bytes(entry.bytes).decode(errors="ignore") for entry in part.logprobs)[:3] == "The"
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)


def test_schema_is_enforced_and_told(running: RunningGateway) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = post(running, {**BODY, "text": text}).json()
    grammar = running.worker.seen[-1].grammar
    assert grammar is not None
    assert json.loads(grammar.text) == schema
    assert response["text"] == text
    bad = {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}
    error = post(running, {**BODY, "text": bad}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_grammar", "text.format.schema")
    assert "response_format" not in error["message"]


# Input


def test_items_become_messages(running: RunningGateway) -> None:
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "two"}], "id": "msg_1"},
        {"role": "user", "content": "three"},
    ]
    assert post(running, {"model": "small", "instructions": "be kind", "input": items}).status_code == 200
    said = [("system", "be kind"), ("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three")]
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    assert prompt_of(running) == f"{turns}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": "word " * 800_000}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"moderation": {"model": "x"}}, "moderation"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "input"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"previous_response_id": "resp_unknown"}, "previous_response_id"),
        ({"top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_field_at_fault_is_named(running: RunningGateway, fields: dict[str, Any], param: str) -> None:
    response = post(running, {**BODY, **fields})
    error = response.json()["error"]
    assert response.status_code == 400
    assert str(error["param"]).startswith(param)
    assert "messages" not in error["message"]


def test_fields_without_effect_are_reported(running: RunningGateway) -> None:
    fields = {
        "weird": 1,
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": True},
        "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"},
    }
    reported = post(running, {**BODY, **fields}).headers["x-nibble-ignored"].split(",")
    assert set(reported) == {
        "weird",
        "include.reasoning.encrypted_content",
        "max_tool_calls",
        "stream_options.include_obfuscation",
        "text.verbosity",
        "reasoning.summary",
    }
    assert "x-nibble-ignored" not in post(running, BODY).headers


@pytest.mark.parametrize("name", ["compact", "input_tokens"])
def test_other_operations_are_no_response_of_that_id(running: RunningGateway, name: str) -> None:
    response = httpx.post(f"{running.url}/v1/responses/{name}", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
