"""Tool calls through the whole service, with the demo model and the `openai` client. Its template knows no tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jsonschema
import openai
import pytest
from running_service import RunningService

QUESTION = [{"role": "user", "content": "What is the weather in Rome, and what time is it there?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
TIME = {
    "type": "object",
    "properties": {"zone": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}},
    "required": ["zone"],
}
TIME |= {"additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "get_time": TIME}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def service(run_service: Callable[..., AbstractContextManager[RunningService]]) -> Iterator[RunningService]:
    with run_service() as running:
        yield running


def ask(service: RunningService, **options: Any) -> Any:
    body = {"model": "demo", "messages": QUESTION, "max_tokens": 200, "seed": 3, "tools": TOOLS, **options}
    return service.client().chat.completions.create(**body)


def folded(chunks: Iterator[Any]) -> tuple[str, list[tuple[str, str, str]], str]:
    """Content, id, name and arguments of each call, finish reason: of one choice, as a client adds them up."""
    content, calls, reason = "", [], ""
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.index == len(calls):
                assert call.type == "function"
                calls.append([call.id, call.function.name, ""])
            calls[call.index][2] += call.function.arguments
        reason = choice.finish_reason or reason
    return content, [(call_id, name, arguments) for call_id, name, arguments in calls], reason


def check_calls(calls: Any) -> None:
    assert calls
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("options", [{"tool_choice": NAMED}, {"tool_choice": "required", "parallel_tool_calls": False}])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_call_that_is_required_is_made_as_its_schema_has_it(
    service: RunningService, options: dict[str, Any], temperature: float
) -> None:
    choice = ask(service, temperature=temperature, **options).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert len(choice.message.tool_calls) == 1
    check_calls(choice.message.tool_calls)
    if options["tool_choice"] == NAMED:
        assert choice.message.tool_calls[0].function.name == "get_weather"


def test_every_choice_of_a_request_has_calls_of_its_own_with_logprobs(service: RunningService) -> None:
    choices = ask(service, tool_choice=NAMED, n=3, temperature=1.5, logprobs=True).choices
    for choice in choices:
        check_calls(choice.message.tool_calls)
        written = json.loads(b"".join(bytes(entry.bytes) for entry in choice.logprobs.content))
        assert written["arguments"] == json.loads(choice.message.tool_calls[0].function.arguments)
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 3


def test_a_stream_adds_up_to_the_whole_answer(service: RunningService) -> None:
    options = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0}
    whole = ask(service, **options)
    content, calls, reason = folded(ask(service, stream=True, **options))
    assert (content, reason) == ("", whole.choices[0].finish_reason)
    message = whole.choices[0].message
    assert [call[1:] for call in calls] == [(c.function.name, c.function.arguments) for c in message.tool_calls]


def test_the_clients_own_stream_parser_understands_it(service: RunningService) -> None:
    tools = [openai.pydantic_function_tool(openai_model(), name="get_time")]
    with service.client().chat.completions.stream(
        model="demo", messages=QUESTION, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=100
    ) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in events
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.parsed_arguments.zone in ("Rome", "Paris")


def openai_model() -> Any:
    from typing import Literal

    from pydantic import BaseModel

    class Zone(BaseModel):
        zone: Literal["Rome", "Paris"]

    return Zone


def test_a_length_is_told_although_there_are_calls(service: RunningService) -> None:
    choice = ask(service, tool_choice=NAMED, max_tokens=14, temperature=0).choices[0]
    assert choice.finish_reason == "length"


def test_text_or_a_call_where_the_model_may_choose(service: RunningService) -> None:
    for seed in range(4):
        choice = ask(service, seed=seed, temperature=1.2, max_tokens=60, parallel_tool_calls=False).choices[0]
        if choice.finish_reason == "tool_calls":
            check_calls(choice.message.tool_calls)
        elif not choice.message.tool_calls:
            assert not choice.message.content.lstrip().startswith("{")


def test_an_answer_in_a_format_or_a_call(service: RunningService) -> None:
    """With tools a text has the format that was asked for, where it is no call."""
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(4):
        choice = ask(service, seed=seed, temperature=1.2, response_format=wanted, parallel_tool_calls=False).choices[0]
        if choice.message.tool_calls:
            check_calls(choice.message.tool_calls)
        else:
            jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_conversation_goes_on_after_a_result(service: RunningService) -> None:
    call = ask(service, tool_choice=NAMED, temperature=0).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "Sunny, 25 degrees."}
    messages = [*QUESTION, call.model_dump(exclude_none=True), result]
    choice = ask(service, messages=messages, tool_choice="none", temperature=0, max_tokens=40).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content


def test_what_cannot_be_enforced_is_refused_by_name(service: RunningService) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [*TOOLS, {"type": "function", "function": {"name": "tag", "parameters": bad, "strict": True}}]
    with pytest.raises(openai.BadRequestError) as raised:
        ask(service, tools=tools)
    assert raised.value.param == "tools[2].function.parameters"
    assert "of tag: uniqueItems at #/properties/a cannot be enforced" in str(raised.value)
