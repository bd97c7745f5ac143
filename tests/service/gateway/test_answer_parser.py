"""Reasoning, content and tool calls in texts as models of each style write them, however the texts are cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nibble.service.gateway.answer_parser import Answer, AnswerFormat, AnswerParser
from nibble.service.gateway.tool_styles import GENERIC, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, ToolStyle

NAMES = frozenset({"get_weather", "get_time", "run"})
STYLES = [HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, GENERIC]
Outcome = tuple[str, str, list[tuple[str, str]], bool]


def parse(
    text: str,
    style: ToolStyle | None,
    cuts: Iterable[int] = (),
    *,
    has_reasoning: bool = False,
    is_thinking: bool = False,
) -> Outcome:
    """Reasoning, content, name and arguments of each call, and whether all of them are whole."""
    parser = AnswerParser(AnswerFormat(has_reasoning, is_thinking, style, NAMES), "chatcmpl-1")
    answer = Answer()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(bounds):
        parser.push(text[start:end])
        answer.add(*parser.take())
    parser.finish()
    answer.add(*parser.take())
    calls = [(call.name, call.arguments) for call in answer.calls]
    assert len({call.id for call in answer.calls}) == len(calls)
    return answer.reasoning, answer.content, calls, parser.has_whole_calls


ROME, PARIS = ("get_weather", '{"city": "Rome"}'), ("get_time", '{"zone": "Europe/Paris", "h24": true}')
# Style, what a model wrote, and the content and calls that it means.
RECORDED: list[tuple[ToolStyle, str, str, Sequence[tuple[str, str]]]] = [
    (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>', "", [ROME]),
    (
        HERMES,
        "Let me look.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris", "h24": true}}\n</tool_call>',
        "Let me look.",
        [ROME, PARIS],
    ),
    (HERMES, '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>', "", [ROME]),
    (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}\n</tool_call>\nDone.',
        "\nDone.",
        [ROME],
    ),
    (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}', "", [ROME]),
    (HERMES, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_', "", [ROME]),
    (
        HERMES,
        '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}\n</tool_call>',
        "",
        [("get_weather", '{"city": "Rome"}')],
    ),
    (
        HERMES,
        '<tool_call>\n{"name": "run", "arguments": {"code": "}</tool_call>\\"{"}}\n</tool_call>',
        "",
        [("run", '{"code": "}</tool_call>\\"{"}')],
    ),
    (
        HERMES,
        '<tool_call>{"name": "run", "arguments": {"é": [1, {"a": "\\\\"}]}, "id": "}"}</tool_call>!',
        "!",
        [("run", '{"é": [1, {"a": "\\\\"}]}')],
    ),
    (HERMES, '<tool_call>\n{"name": "get_time"}\n</tool_call>', "", [("get_time", "{}")]),
    (LLAMA, '{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
    (
        LLAMA,
        '\n{"name": "get_weather", "parameters": {"city": "Rome"}}; '
        '{"name": "get_time", "parameters": {"zone": "Europe/Paris", "h24": true}}',
        "",
        [ROME, PARIS],
    ),
    (
        LLAMA,
        '{"type": "function", "function": "get_weather", "parameters": {}}',
        '{"type": "function", "function": "get_weather", "parameters": {}}',
        [],
    ),
    (LLAMA, '<|python_tag|>brave_search.call(query="Rome")', '<|python_tag|>brave_search.call(query="Rome")', []),
    (MISTRAL, '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}]', "", [ROME]),
    (
        MISTRAL,
        'Sure.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}, '
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris", "h24": true}, "id": "abcdefghi"}]',
        "Sure.",
        [ROME, PARIS],
    ),
    (MISTRAL_NAMED, '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "", [ROME]),
    (
        MISTRAL_NAMED,
        '[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{"city": "Rome"}'
        '[TOOL_CALLS]get_time[ARGS]{"zone": "Europe/Paris", "h24": true}',
        "",
        [ROME, PARIS],
    ),
    (MISTRAL_NAMED, '[TOOL_CALLS]get_weather{"city": "Rome"}', "", [ROME]),
    (
        GENERIC,
        '{"name": "get_weather", "arguments": {"city": "Rome"}}\n'
        '{"name": "get_time", "parameters": {"zone": "Europe/Paris", "h24": true}}',
        "",
        [ROME, PARIS],
    ),
    (GENERIC, '[{"name": "get_weather", "arguments": {"city": "Rome"}}]', "", [ROME]),
]
# What is no call is content, to the letter.
NO_CALLS: list[tuple[ToolStyle, str]] = [
    (style, text)
    for style in STYLES
    for text in (
        "",
        " \n",
        "Rome is warm. ",
        "1 < 2, a [TOOL or <tool",
        '{"city": "Rome", "name": "get_weather"}\n',
        '{"name": "no_such_function", "arguments": {"city": "Rome"}}',
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": 3, "arguments": {}}',
        "{name: get_weather}",
        '[1, {"name": "get_weather", "arguments": {}}]',
        '{"name": "get_weather", ',
        "[",
    )
] + [
    (HERMES, '<tool_call>\n{"name": "no_such_function", "arguments": {"city": "Rome"}}\n</tool_call>\n'),
    (HERMES, "<tool_call>\nget_weather(Rome)\n</tool_call>"),
    (HERMES, "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"),
    (HERMES, "<tool_call>"),
    (HERMES, ' <tool_call> <tool_call>{"name"'),
    (HERMES, '{"name": "get_weather", "arguments": {"city": "Rome"}}'),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS]get weather please"),
    (MISTRAL_NAMED, "[TOOL_CALLS]no_such_function[ARGS]{}"),
    (MISTRAL_NAMED, "[TOOL_CALLS]" + "a" * 300 + "[ARGS]{}"),
    (GENERIC, 'Sure: {"name": "get_weather", "arguments": {"city": "Rome"}}'),
]


@pytest.mark.parametrize(("style", "text", "content", "calls"), RECORDED)
def test_recorded_calls(style: ToolStyle, text: str, content: str, calls: Sequence[tuple[str, str]]) -> None:
    assert parse(text, style) == ("", content, list(calls), bool(calls))
    assert parse(text, style, range(len(text))) == ("", content, list(calls), bool(calls))
    for cut in range(len(text)):
        assert parse(text, style, [cut]) == ("", content, list(calls), bool(calls))
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize(("style", "text"), NO_CALLS)
def test_what_is_no_call_is_content(style: ToolStyle, text: str) -> None:
    for cuts in ([], range(len(text)), *([cut] for cut in range(len(text)))):
        assert parse(text, style, cuts) == ("", text, [], False)


@pytest.mark.parametrize(("style", "text", "content", "calls"), RECORDED)
def test_a_text_that_was_cut_off_has_the_beginning_of_its_calls(
    style: ToolStyle, text: str, content: str, calls: Sequence[tuple[str, str]]
) -> None:
    """And a call whose arguments have not ended is not whole."""
    for end in range(len(text)):
        _, _, found, is_whole = parse(text[:end], style)
        for (name, arguments), (whole_name, whole_arguments) in zip(found, calls, strict=False):
            assert name == whole_name
            assert whole_arguments.startswith(arguments)
        if is_whole:
            assert [json.loads(arguments) for _, arguments in found]


@pytest.mark.parametrize("style", [None, HERMES, GENERIC])
@pytest.mark.parametrize(
    ("text", "is_thinking", "reasoning", "content"),
    [
        ("<think>\nHm, 2 < 3.\n</think>\n\nYes. ", False, "Hm, 2 < 3.", "Yes. "),
        ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
        ("\n\n</think>\n\nYes.", True, "", "Yes."),
        ("<think></think>Yes.", False, "", "Yes."),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("<thinking>", False, "", "<thinking>"),
        ("<thi", False, "", "<thi"),
        ("<think>Hm. </thi", False, "Hm. </thi", ""),
        ("Hm", True, "Hm", ""),
        ("", True, "", ""),
        ("\n\nYes", False, "", "\n\nYes"),
    ],
)
def test_reasoning(style: ToolStyle | None, text: str, is_thinking: bool, reasoning: str, content: str) -> None:
    for cuts in ([], range(len(text)), *([cut] for cut in range(len(text)))):
        found = parse(text, style, cuts, has_reasoning=True, is_thinking=is_thinking)
        assert found == (reasoning, content, [], False)


@pytest.mark.parametrize(("style", "text", "content", "calls"), RECORDED)
def test_calls_after_reasoning(style: ToolStyle, text: str, content: str, calls: Sequence[tuple[str, str]]) -> None:
    thought = 'I call {"name": "get_time"} with <tool_call>.'
    found = parse(f"<think>{thought}</think>\n\n{text}", style, has_reasoning=True)
    assert found == (thought, content.lstrip() if not calls else content, list(calls), bool(calls))


PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>"),
    *('{"name": "', "get_weather", '", "arguments": ', '", "parameters": ', '{"city": "Rome"}', '"type": "function", '),
    *('{"', "{", "}", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "x", "é", "1", "<", "null"),
]


@settings(max_examples=2000, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    style=st.sampled_from([None, *STYLES]),
    cuts=st.lists(st.integers(0, 80), max_size=12),
    has_reasoning=st.booleans(),
    is_thinking=st.booleans(),
)
@example('[TOOL_CALLS]get_weather{"city": "Rome"}', MISTRAL, [12], False, False)
def test_how_a_text_is_cut_changes_nothing(
    text: str, style: ToolStyle | None, cuts: list[int], has_reasoning: bool, is_thinking: bool
) -> None:
    whole = parse(text, style, has_reasoning=has_reasoning, is_thinking=is_thinking)
    for some_cuts in (cuts, range(len(text))):
        assert parse(text, style, some_cuts, has_reasoning=has_reasoning, is_thinking=is_thinking) == whole
    if not has_reasoning and not whole[2]:
        assert whole[1] == text, "what holds no call is content, all of it"


@settings(max_examples=300, deadline=None)
@given(
    style=st.sampled_from(STYLES),
    calls=st.lists(
        st.tuples(
            st.sampled_from(sorted(NAMES)),
            st.dictionaries(
                st.text(max_size=4), st.text(max_size=9) | st.integers() | st.lists(st.booleans()), max_size=3
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
def test_calls_in_the_style_of_their_templates_are_read_back(
    style: ToolStyle, calls: list[tuple[str, dict[str, object]]], cuts: list[int]
) -> None:
    def written(name: str, arguments: dict[str, object]) -> str:
        if style.is_named:
            return f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}"
        call = json.dumps({"name": name, style.arguments_key: arguments}, ensure_ascii=False)
        return f"<tool_call>\n{call}\n</tool_call>" if style is HERMES else call

    text = style.separator.join(written(*call) for call in calls)
    text = f"[TOOL_CALLS][{text}]" if style.is_list else text
    for some_cuts in ([], cuts, range(len(text))):
        _, content, found, is_whole = parse(text, style, some_cuts)
        assert (content, is_whole) == ("", True)
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls
