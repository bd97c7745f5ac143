"""Tools in a chat request: what is refused, and how the answer is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import templates
from chat_plans import plan, refusal
from conftest import RunningGateway
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import write_model
from tokenizers import Tokenizer
from tool_cases import (
    LOOSE,
    SHORT,
    STRICT,
    UNENFORCEABLE,
    read,
    with_template,
)

from nibble.engine.protocol import FinishReason
from nibble.service.gateway.served_model import ServedModel

# What is refused


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [*LOOSE, LOOSE[1]]}, "tools[2].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": LOOSE[1:] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": LOOSE, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": LOOSE, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        ({"tools": LOOSE, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tools": LOOSE, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
            "tool_choice.allowed_tools.tools",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"tools": [UNENFORCEABLE], "tool_choice": "required"}, "tools[0].function.parameters"),
    ],
)
def test_what_is_no_choice_of_tools_is_refused_by_name(
    running: RunningGateway, fields: dict[str, Any], param: str
) -> None:
    num_seen = len(running.worker.seen)
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], **fields}
    response = running.post(body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(running.worker.seen) == num_seen


def test_a_schema_that_cannot_be_enforced_names_function_and_keyword(chatml: ServedModel) -> None:
    error = refusal(chatml, tools=[*STRICT, UNENFORCEABLE], tool_choice="required")
    assert error.code == "invalid_grammar"
    assert error.message == "tools[2].function.parameters of tag: not at #/properties/a cannot be enforced"
    assert plan(chatml, tools=[UNENFORCEABLE]).requests[0].grammar is None, "and is no matter where it need not be"


# The answer


TEXTS = [
    "<think>Hm, é.</think>\n\nI look.\n<tool_call>\n"
    '{"name": "get_weather", "arguments": {"city": "Rome 😀"}}\n</tool_call>\n<tool_call>\n'
    '{"name": "now", "arguments": {}}\n</tool_call>',
    "<think>\nNo.\n</think>\n\nIt is sunny.",
    '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "now", "arguments": {"a": "',
    "Sunny. ",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.sampled_from(TEXTS),
    end=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=10),
    options=st.sampled_from([{}, {"stop": ["</tool"]}, {"stop": ["é", "k."]}, {"min_tokens": 9}]),
    reason=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
)
def test_how_tokens_came_changes_nothing(
    tool_model: ServedModel, text: str, end: int, cuts: list[int], options: dict[str, Any], reason: FinishReason
) -> None:
    model = with_template(tool_model, templates.QWEN3)
    made = plan(model, tools=LOOSE, **options)
    token_ids = model.encode(text)[:end]
    whole = read(made, model, token_ids, [], reason)
    assert read(made, model, token_ids, cuts, reason) == whole
    assert read(made, model, token_ids, list(range(len(token_ids))), reason) == whole
    if reason is FinishReason.LENGTH:
        assert whole[3] != "tool_calls"


def test_reasons_and_counts(tool_model: ServedModel) -> None:
    model = with_template(tool_model, templates.QWEN3)
    made = plan(model, tools=LOOSE)
    token_ids = model.encode(TEXTS[0])
    reasoning, content, calls, reason, num_tokens, num_reasoning = read(made, model, token_ids, [3], FinishReason.STOP)
    assert (reasoning, content, reason, num_tokens) == ("Hm, é.", "I look.", "tool_calls", len(token_ids))
    assert calls == [("get_weather", '{"city": "Rome 😀"}'), ("now", "{}")]
    thought = model.encode("<think>Hm, é.</think>")
    assert len(thought) - len(model.encode("<think>")) + 1 <= num_reasoning <= len(thought) + 1
    assert read(made, model, token_ids, [], FinishReason.LENGTH)[3] == "length", "it may have wanted more"
    assert read(made, model, model.encode(TEXTS[3]), [], FinishReason.STOP)[2:4] == ([("now", '{"a": "')], "stop")


def test_a_stream_adds_up_to_the_whole_answer(running: RunningGateway) -> None:
    """Through HTTP, with several choices, a stop string that does not come, log probabilities and usage."""
    text = '{"name": "get_weather", "arguments": {"city": "Rome"}}\n{"name": "now", "arguments": {}}'
    running.reply_with(text)
    body: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": SHORT,
        "n": 2,
        "stop": ["@@"],
        "logprobs": True,
    }
    client = running.openai()
    whole = client.chat.completions.create(**body)
    for choice in whole.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        assert [made.function.name for made in choice.message.tool_calls] == ["get_weather", "now"]
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    calls: list[dict[int, list[Any]]] = [{}, {}]
    contents, reasons, num_logprobs, usage = ["", ""], ["", ""], [0, 0], None
    for chunk in stream:
        usage = chunk.usage
        for part in chunk.choices:
            contents[part.index] += part.delta.content or ""
            reasons[part.index] = part.finish_reason or reasons[part.index]
            num_logprobs[part.index] += len(part.logprobs.content or ()) if part.logprobs else 0
            for made in part.delta.tool_calls or ():
                assert made.function is not None
                if made.index not in calls[part.index]:
                    assert (bool(made.id), made.type) == (True, "function"), "the name comes first"
                    calls[part.index][made.index] = [made.function.name, ""]
                calls[part.index][made.index][1] += made.function.arguments or ""
    assert usage == whole.usage
    for i, choice in enumerate(whole.choices):
        expected = [[made.function.name, made.function.arguments] for made in choice.message.tool_calls or ()]
        assert list(calls[i].values()) == expected
        assert (contents[i], reasons[i]) == ("", choice.finish_reason)
        assert choice.logprobs is not None
        assert num_logprobs[i] == len(choice.logprobs.content or ()) == len(running.gateway.model.encode(text))


def test_reasoning_comes_in_both_fields_and_is_counted(run_gateway: Any, tmp_path: Path, byte_level: Tokenizer) -> None:
    directory = write_model(tmp_path / "small", byte_level, "<|im_end|>", templates.QWEN3)
    with run_gateway(model_dir=directory) as running:
        running.reply_with("<think>\nHm, 2.\n</think>\n\nTwo.")
        body = {"model": "small", "messages": [{"role": "user", "content": "1 + 1?"}]}
        whole = running.post(body).json()
        message = whole["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("Hm, 2.", "Hm, 2.", "Two.")
        details = whole["usage"]["completion_tokens_details"]
        assert 0 < details["reasoning_tokens"] < whole["usage"]["completion_tokens"]
        deltas = [
            chunk.choices[0].delta.model_dump()
            for chunk in running.openai().chat.completions.create(**body, stream=True)
        ]
        for field in ("reasoning", "reasoning_content"):
            assert "".join(delta.get(field) or "" for delta in deltas) == "Hm, 2."
        assert "".join(delta.get("content") or "" for delta in deltas) == "Two."
