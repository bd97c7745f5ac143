"""What a model is shown of tools, calls, results and reasoning, by the style of its chat template."""

from __future__ import annotations

import dataclasses
import json

import pytest
import templates
from chat_plans import plan, prompt
from tool_cases import (
    ALL,
    CONVERSATION,
    LOOSE,
    NAMED,
    WEATHER,
    call,
    with_template,
)

from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.tool_styles import ReasoningParserName, ToolCallParserName


def test_a_template_without_tools_is_told_of_them_in_the_system_message(chatml: ServedModel) -> None:
    text = prompt(chatml, tools=LOOSE)
    assert text.startswith("<|im_start|>system\nYou can call these functions:\n")
    assert json.dumps({"name": "get_weather", "description": "", "parameters": WEATHER}) in text
    assert '{"name": <its name>, "arguments": <an object>}' in text
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    text = prompt(chatml, tools=LOOSE, messages=messages)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call")
    assert 'assistant\n{"name": "get_weather", "arguments": {"city": "Rome"}}<|im_end|>' in text
    assert "user\nResult of get_weather: sunny<|im_end|>" in text


def test_results_of_several_calls_are_one_message_where_no_template_knows_them(chatml: ServedModel) -> None:
    calls = [call(), call("now", "{}", "b")]
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("123456789", "b")]
    text = prompt(chatml, messages=[{"role": "assistant", "content": "I look.", "tool_calls": calls}, *results])
    assert 'I look.\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n{"name": "now", "arguments": {}}<' in text
    assert "user\nResult of get_weather: 123456789\nResult of now: b<|im_end|>" in text


def test_no_tools_are_shown_that_cannot_be_called(chatml: ServedModel) -> None:
    assert "get_weather" not in prompt(chatml, tools=LOOSE, tool_choice="none")
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
    text = prompt(chatml, tools=LOOSE, tool_choice=some)
    assert "now" in text
    assert "get_weather" not in text


@pytest.mark.parametrize("name", ALL)
def test_templates_get_calls_and_results_as_they_want_them(tool_model: ServedModel, name: str) -> None:
    text = prompt(with_template(tool_model, ALL[name]), messages=CONVERSATION, tools=LOOSE)
    assert '{"city": "Rome"}' in text
    assert "sunny" in text
    assert text.count("strict") == 0


def test_a_template_of_its_own_for_tools(chatml: ServedModel) -> None:
    model = dataclasses.replace(chatml, tool_template=ChatTemplate("with tools <tool_call>", {}))
    assert prompt(model, tools=LOOSE) == "with tools <tool_call>"
    assert prompt(model, messages=CONVERSATION) == "with tools <tool_call>"
    assert prompt(model) != "with tools <tool_call>"
    assert model.tool_style.name == "hermes"


@pytest.mark.parametrize(
    ("name", "style"),
    [*zip(ALL, ["hermes", "hermes", "llama", "mistral", "mistral", "generic"], strict=True)],
)
def test_the_style_is_the_templates_unless_another_is_wanted(chatml: ServedModel, name: str, style: str) -> None:
    model = with_template(chatml, ALL[name])
    assert model.tool_style.name == style
    assert model.tool_style.is_named == (name == "mistral named")
    assert model.has_reasoning == (name in ("qwen3", "deepseek"))
    other = dataclasses.replace(
        model, tool_call_parser=ToolCallParserName.LLAMA, reasoning_parser=ReasoningParserName.THINK
    )
    assert (other.tool_style.name, other.has_reasoning) == ("llama", True)
    assert not dataclasses.replace(model, reasoning_parser=ReasoningParserName.NONE).has_reasoning


def test_reasoning_effort_and_thinking_reach_the_template(chatml: ServedModel) -> None:
    model = with_template(chatml, templates.QWEN3)
    assert prompt(model).endswith("assistant\n")
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        made = plan(model, **fields)
        assert prompt(model, **fields).endswith("</think>\n\n")
        assert made.format is None, "there is no reasoning to be read"
        assert made.ignored == ()
    assert plan(model, reasoning_effort="high").ignored == ("reasoning_effort",)
    knowing = with_template(chatml, "{{ reasoning_effort }}")
    assert prompt(knowing, reasoning_effort="high") == "high"
    assert plan(knowing, reasoning_effort="high").ignored == ()
    assert prompt(knowing, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"}) == "low"


def test_reasoning_of_earlier_turns_reaches_the_template(chatml: ServedModel) -> None:
    model = with_template(chatml, templates.QWEN3)
    for field in ("reasoning", "reasoning_content"):
        messages = [{"role": "assistant", "content": "yes", field: "hm"}]
        assert "<think>hm</think>yes" in prompt(model, messages=messages)
