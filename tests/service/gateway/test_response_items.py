"""Calls of functions and reasoning as items of responses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import templates
from conftest import RunningGateway
from responses_client import BODY, events_of, post, prompt_of, without_ids
from small_models import write_model
from tokenizers import Tokenizer

from nibble.service.gateway.response_items import to_messages
from nibble.service.gateway.schema.responses import Item

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


def test_a_call_that_the_model_did_not_finish_is_incomplete(running: RunningGateway) -> None:
    """It ended by itself, and may not be called with half of its arguments."""
    running.reply_with(CALLS[:-1].removesuffix("}"))
    body = {"model": "small", "input": "x", "tools": [TOOL]}
    events = events_of(post(running, {**body, "stream": True}).text)
    for response in (post(running, body).json(), events[-1]["response"]):
        assert response["status"] == "completed"
        assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


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


def test_reasoning_that_was_cut_is_not_that_of_a_later_answer() -> None:
    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    items = [
        {"role": "user", "content": "1"},
        thought("cut"),
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
        thought("whole"),
        {"role": "assistant", "content": "three"},
    ]
    messages = to_messages([Item.model_validate(item) for item in items], "input")
    assert [message.get("reasoning_content") for message in messages] == [None, None, None, None, "whole"]
