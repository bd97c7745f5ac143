"""/v1/responses through a real server, a real broker and the `openai` client."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import templates
from conftest import RunningGateway, wait_for
from openai.types.responses import ResponseOutputMessage, ResponseOutputText
from small_models import write_model
from tokenizers import Tokenizer

TEXT = "The quick brown 😀 fox — über 日本."
BODY: dict[str, Any] = {"model": "small", "input": TEXT}


def post(running: RunningGateway, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/responses", json=body, headers=headers, timeout=30)


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    events = []
    for block in blocks[:-1]:
        event_id, name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event_id.endswith(f":{event['sequence_number']}")
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt_of(running: RunningGateway) -> str:
    return str(running.tokenizer.decode(running.worker.seen[-1].prompt_token_ids, skip_special_tokens=False))


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


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in response.items() if name not in ("id", "created_at", "completed_at")}
    return {**kept, "output": [{**item, "id": None} for item in response["output"]]}


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


# What is kept


def test_response_is_retrieved_and_deleted(running: RunningGateway) -> None:
    client = running.openai()
    created = client.responses.create(**BODY)
    assert client.responses.retrieve(created.id) == created
    client.responses.delete(created.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            call(created.id)
        assert raised.value.code == "response_not_found"
    assert post(running, {**BODY, "previous_response_id": created.id}).status_code == 400


def test_response_is_not_kept_where_it_should_not_be(running: RunningGateway) -> None:
    client = running.openai()
    created = client.responses.create(**BODY, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(created.id)


def test_conversation_goes_on_from_a_response(running: RunningGateway) -> None:
    client = running.openai()
    first = client.responses.create(model="small", input="one", instructions="be kind")
    second = client.responses.create(model="small", input="two", previous_response_id=first.id)
    client.responses.create(model="small", input="three", previous_response_id=second.id)
    said = [("user", "one"), ("assistant", "one"), ("user", "two"), ("assistant", "two"), ("user", "three")]
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    assert prompt_of(running) == f"{turns}<|im_start|>assistant\n", "instructions are of one response alone"
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="small", input="four", previous_response_id=second.id)
    assert raised.value.code == "previous_response_not_found"


def test_streamed_response_can_be_gone_on_from_at_once(running: RunningGateway) -> None:
    with running.openai().responses.stream(model="small", input="one") as stream:
        for event in stream:
            if event.type == "response.completed":
                kept = running.openai().responses.retrieve(event.response.id)
                assert (kept.status, kept.output_text) == ("completed", "one")


def test_input_items_are_listed(running: RunningGateway) -> None:
    client = running.openai()
    items: Any = [{"role": "user", "content": f"item {number}"} for number in range(5)]
    created = client.responses.create(model="small", input=items)
    listed = list(client.responses.input_items.list(created.id, limit=2))
    assert [item.content[0].text for item in listed] == [f"item {number}" for number in (4, 3, 2, 1, 0)]  # type: ignore[union-attr]
    first = client.responses.input_items.list(created.id, order="asc", limit=1)
    assert (first.data[0].id, first.has_more) == (listed[-1].id, True)
    for query in ("order=up", "limit=0", "limit=x", "after=msg_x"):
        url = f"{running.url}/v1/responses/{created.id}/input_items?{query}"
        assert httpx.get(url).status_code == 400


def test_kept_for_a_while_alone(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(response_ttl_s=1.5) as running:
        client = running.openai()
        first = client.responses.create(**BODY)
        assert client.responses.retrieve(first.id).id == first.id
        pause = threading.Event()
        pause.wait(0.8)
        second = client.responses.create(**BODY, previous_response_id=first.id)
        pause.wait(0.8)
        client.responses.create(**BODY, previous_response_id=second.id)
        pause.wait(1.7)
        assert post(running, {**BODY, "previous_response_id": second.id}).status_code == 400


def test_other_gateways_know_it_and_other_clients_do_not(run_gateway: Callable[..., Any]) -> None:
    keys = {"api_keys": ("one", "two")}
    with (
        run_gateway(**keys) as one,
        run_gateway(has_worker=False, namespace=one.gateway.settings.namespace, **keys) as other,
    ):
        created = post(one, BODY, authorization="Bearer one").json()

        def ask(method: str, key: str, path: str = "") -> int:
            url = f"{other.url}/v1/responses/{created['id']}{path}"
            return httpx.request(method, url, headers={"authorization": f"Bearer {key}"}).status_code

        assert (ask("GET", "one"), ask("GET", "two")) == (200, 404)
        assert (ask("GET", "two", "/input_items"), ask("DELETE", "two"), ask("POST", "two", "/cancel")) == (404,) * 3
        body = {**BODY, "previous_response_id": created["id"]}
        assert post(other, body, authorization="Bearer two").json()["error"]["code"] == "previous_response_not_found"
        assert post(other, body, authorization="Bearer one").status_code == 200


# While it is generated


def test_running_response_is_retrieved_and_cancelled(running: RunningGateway) -> None:
    running.worker.gate.clear()
    client = running.openai()
    with httpx.stream("POST", f"{running.url}/v1/responses", json={**BODY, "stream": True}, timeout=10) as response:
        chunks = response.iter_text()
        first = next(chunks)
        response_id = first.split("\n")[0].removeprefix("id: ").split(":")[0]
        assert client.responses.retrieve(response_id).status == "in_progress"
        assert client.responses.cancel(response_id).status == "cancelled"
        last = events_of(first + "".join(chunks))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
    wait_for(lambda: response_id in running.worker.dropped)
    assert client.responses.retrieve(response_id).status == "cancelled"


def test_running_response_is_deleted_for_good(running: RunningGateway) -> None:
    running.worker.gate.clear()
    with httpx.stream("POST", f"{running.url}/v1/responses", json={**BODY, "stream": True}, timeout=10) as response:
        chunks = response.iter_text()
        response_id = next(chunks).split("\n")[0].removeprefix("id: ").split(":")[0]
        running.openai().responses.delete(response_id)
        "".join(chunks)
    with pytest.raises(openai.NotFoundError):
        running.openai().responses.retrieve(response_id)


def test_failure(running: RunningGateway) -> None:
    body = {"model": "small", "input": "fail: too odd"}
    response = post(running, body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    last = events_of(post(running, {**body, "stream": True}).text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "fail: too odd"}
    stored = running.openai().responses.retrieve(last["response"]["id"])
    assert stored.error is not None
    assert stored.error.message == "fail: too odd"


def test_repeat_gives_the_same_response(running: RunningGateway) -> None:
    first, second = (post(running, BODY, **{"idempotency-key": "once"}).json() for _ in range(2))
    assert {**first, "completed_at": 0} == {**second, "completed_at": 0}


# Tools and reasoning

TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}
CALLS = '{"name": "get_weather", "arguments": {"city": "Rome"}}\n{"name": "get_weather", "arguments": {}}'


def test_calls_are_items_and_their_results_go_back(running: RunningGateway) -> None:
    running.reply_with(CALLS)
    client = running.openai()
    tools: Any = [TOOL]
    first = client.responses.create(model="small", input="Weather?", tools=tools)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments), call.status) for call in calls] == [
        ("get_weather", {"city": "Rome"}, "completed"),
        ("get_weather", {}, "completed"),
    ]
    results: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "22 C"} for call in calls]
    running.reply_with("Warm.")
    second = client.responses.create(model="small", input=results, tools=tools, previous_response_id=first.id)
    assert second.output_text == "Warm."
    prompt = prompt_of(running)
    assert prompt.index("Weather?") < prompt.index("Rome") < prompt.index("22 C")


def test_events_of_calls(running: RunningGateway) -> None:
    running.reply_with(CALLS)
    events = events_of(post(running, {"model": "small", "input": "x", "tools": [TOOL], "stream": True}).text)
    added = [event["item"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["arguments"] for item in added] == ["", ""]
    assert done == events[-1]["response"]["output"]
    for index, item in enumerate(done):
        own = [event for event in events if event.get("output_index") == index]
        deltas = [event["delta"] for event in own if event["type"] == "response.function_call_arguments.delta"]
        (last,) = [event for event in own if event["type"] == "response.function_call_arguments.done"]
        assert "".join(deltas) == last["arguments"] == item["arguments"]
        assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}


def test_tool_at_fault_is_named_as_it_was_sent(running: RunningGateway) -> None:
    bad = {**TOOL, "name": "no name"}
    error = post(running, {**BODY, "tools": [bad]}).json()["error"]
    assert error["param"] == "tools[0].name"
    assert "tools[0].name" in error["message"]


def test_reasoning_is_an_item_before_the_message(
    run_gateway: Callable[..., Any], tmp_path: Path, byte_level: Tokenizer
) -> None:
    directory = write_model(tmp_path / "small", byte_level, "<|im_end|>", templates.QWEN3)
    with run_gateway(model_dir=directory) as running:
        running.reply_with("<think>\nHm, 2.\n</think>\n\nTwo.")
        whole = post(running, BODY).json()
        reasoning, message = whole["output"]
        assert (reasoning["type"], reasoning["content"]) == (
            "reasoning",
            [{"type": "reasoning_text", "text": "Hm, 2."}],
        )
        assert message["content"][0]["text"] == "Two."
        assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        events = events_of(post(running, {**BODY, "stream": True}).text)
        assert without_ids(events[-1]["response"]) == without_ids(whole)
        thought = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
        assert "".join(thought) == "Hm, 2."
        again = post(running, {**BODY, "previous_response_id": whole["id"]})
        assert again.status_code == 200
