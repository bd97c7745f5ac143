"""Tools in a chat request: what the model is shown, what it is held to, and how its answer is read."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import templates
from conftest import RunningGateway
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import byte_level_tokenizer, write_model
from test_chat import plan, prompt, refusal
from tokenizers import AddedToken, Tokenizer

from nibble.engine.protocol import FinishReason, GrammarSpec, TokenEvent
from nibble.grammar.compiler import GrammarCompiler
from nibble.service.gateway.answer_parser import Answer
from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.served_model import ServedModel, load_served_model
from nibble.service.gateway.tool_styles import ReasoningParserName, ToolCallParserName

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "<tool_call>"]}},
}
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
STRICT, LOOSE = (
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": is_strict}},
        {"type": "function", "function": {"name": "now"}},
    ]
    for is_strict in (True, False)
)
SHORT = [{"type": "function", "function": {"name": name}} for name in SCHEMAS]
ROOM = 4096  # tokens: declarations are long for a tokenizer that knows few words
NAMED = {"type": "function", "function": {"name": "now"}}
UNENFORCEABLE = {"type": "function", "function": {"name": "tag", "parameters": {"properties": {"a": {"not": {}}}}}}
MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
ALL = {
    "qwen3": templates.QWEN3,
    "hermes": templates.HERMES,
    "llama": templates.LLAMA3,
    "mistral": templates.MISTRAL,
    "mistral named": templates.MISTRAL_NAMED,
    "deepseek": templates.DEEPSEEK,
}


@pytest.fixture(scope="module", params=["markers are tokens", "markers are text"])
def tool_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    tokenizer = byte_level_tokenizer()
    if request.param == "markers are tokens":
        tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS[2:]])
        tokenizer.add_tokens([AddedToken(marker, special=False) for marker in MARKERS[:2]])
    directory = write_model(tmp_path_factory.mktemp("tools") / "small", tokenizer, "<|im_end|>")
    return dataclasses.replace(load_served_model(directory), context_length=ROOM)


@pytest.fixture(scope="module")
def chatml(model_dir: Path) -> ServedModel:
    """Its template knows no tools."""
    return dataclasses.replace(load_served_model(model_dir), context_length=ROOM)


def with_template(model: ServedModel, template: str, **options: Any) -> ServedModel:
    return dataclasses.replace(model, chat_template=ChatTemplate(template, {}), **options)


def call(name: str = "get_weather", arguments: str = '{"city": "Rome"}', call_id: str = "123456789") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call()]},
    {"role": "tool", "tool_call_id": "123456789", "content": "sunny"},
]


def read(made: Plan, model: ServedModel, token_ids: list[int], cuts: list[int], reason: FinishReason) -> Any:
    """What a client is told of these tokens, in events that end at the cuts."""
    choice = Choice(made, model.make_detokenizer(made.skip_special_tokens, made.shown_tokens))
    answer = Answer()
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    for number, (start, end) in enumerate(pairwise(bounds), 2):
        finish_reason = reason if number == len(bounds) else None
        choice.push(
            TokenEvent(request_id="x", index=start, token_ids=token_ids[start:end], finish_reason=finish_reason)
        )
        assert choice.parser is not None
        answer.add(*choice.parser.take())
        if choice.finish_reason is not None:
            break
    calls = [(made.name, made.arguments) for made in answer.calls]
    return answer.reasoning, answer.content, calls, choice.told_reason, choice.num_tokens, choice.num_reasoning_tokens


# The prompt


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
        (
            {"messages": [{"role": "assistant", "tool_calls": [call(arguments="{")]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
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


# What is enforced


@pytest.mark.parametrize(
    ("fields", "is_enforced"),
    [
        ({"tools": LOOSE}, False),
        ({"tools": LOOSE, "parallel_tool_calls": True}, False),
        ({"tools": LOOSE, "tool_choice": "none", "parallel_tool_calls": False}, False),
        ({"tools": STRICT}, True),
        ({"tools": LOOSE, "tool_choice": "required"}, True),
        ({"tools": LOOSE, "tool_choice": NAMED}, True),
        ({"tools": LOOSE, "parallel_tool_calls": False}, True),
        ({"tools": LOOSE, "response_format": {"type": "json_object"}}, True),
    ],
)
def test_a_grammar_where_something_is_enforced(chatml: ServedModel, fields: dict[str, Any], is_enforced: bool) -> None:
    assert (plan(chatml, **fields).requests[0].grammar is not None) == is_enforced


def walks(
    model: ServedModel, spec: GrammarSpec, directory: Path, num_walks: int, opening: str = ""
) -> list[tuple[list[int], bool]]:
    """Random tokens that a grammar allows after the opening, and whether it lets the text end there."""
    import random

    import numpy as np

    path = directory / "tokenizer.json"
    model.tokenizer.save(str(path))
    compiler = GrammarCompiler(path, model.vocab_size, model.eos_token_ids)
    found = []
    for seed in range(num_walks):
        rng, matcher, token_ids = random.Random(seed), compiler.matcher(spec), model.encode(opening)
        assert matcher.consume_tokens(token_ids)
        favourites = [model.tokenizer.token_to_id(marker) for marker in MARKERS]
        favourites += [model.encode(text)[0] for text in ('"', "}", "]", "{", "<")]
        while not matcher.is_stopped() and len(token_ids) < 200:
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = [i for i in np.flatnonzero(bits).tolist() if i not in compiler.tokenizer.eos_tokens]
            if not allowed or (matcher.is_accepting() and rng.random() < 0.2):
                break
            liked = [i for i in favourites if i is not None and bits[i]]
            token_ids.append(rng.choice(liked if liked and rng.random() < 0.5 else allowed))
            assert matcher.consume_token(token_ids[-1])
        assert not matcher.is_error(), matcher.get_error()
        found.append((token_ids, matcher.is_accepting()))
    return found


@pytest.mark.parametrize("name", ["generic", *ALL])
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": NAMED},
        {},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_a_grammar_allows_is_read_as_calls_that_fit(
    tool_model: ServedModel, tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    model = with_template(tool_model, ALL[name]) if name in ALL else tool_model
    made = plan(model, tools=STRICT, **fields)
    spec = made.requests[0].grammar
    assert spec is not None
    assert made.format is not None
    # Nobody writes a marker at random where it is no token.
    opening = "" if not made.format.has_reasoning else "Hm.</think>" if made.format.is_thinking else "<think></think>"
    num_whole = num_calls = 0
    for token_ids, is_whole in walks(model, spec, tmp_path, 25, opening):
        if not is_whole:
            continue
        _, content, calls, reason, _, _ = read(made, model, token_ids, list(range(len(token_ids))), FinishReason.STOP)
        num_whole += 1
        num_calls += len(calls)
        for function, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[function])
        assert reason == ("tool_calls" if calls else "stop")
        if "tool_choice" in fields:
            assert calls
            assert content == ""
        if fields.get("tool_choice") == NAMED:
            assert [function for function, _ in calls] == ["now"]
        if fields.get("parallel_tool_calls") is False:
            assert len(calls) <= 1
        if "response_format" in fields and not calls:
            assert isinstance(json.loads(content), dict)
    assert num_whole > 2
    assert num_calls > 0 or "tool_choice" not in fields


def test_a_format_applies_after_the_reasoning(tool_model: ServedModel, tmp_path: Path) -> None:
    for template, opening in ((templates.QWEN3, "<think>Hm.</think>"), (templates.DEEPSEEK, "Hm.</think>\n\n")):
        model = with_template(tool_model, template)
        made = plan(model, response_format={"type": "json_object"})
        spec = made.requests[0].grammar
        assert spec is not None
        num_whole = 0
        for token_ids, is_whole in walks(model, spec, tmp_path, 20, opening):
            if is_whole:
                num_whole += 1
                thought, content, _, _, _, num_tokens = read(made, model, token_ids, [], FinishReason.STOP)
                assert isinstance(json.loads(content), dict)
                assert thought == "Hm."
                assert num_tokens > 0
        assert num_whole > 2
    off = plan(
        with_template(tool_model, templates.QWEN3), reasoning_effort="none", response_format={"type": "json_object"}
    )
    assert off.requests[0].grammar is not None
    assert off.requests[0].grammar.text == ""


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
