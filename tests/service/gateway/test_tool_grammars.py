"""What a grammar holds the model to where a request has tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import templates
from chat_plans import plan
from tool_cases import (
    ALL,
    LOOSE,
    MARKERS,
    NAMED,
    SCHEMAS,
    STRICT,
    read,
    with_template,
)

from nibble.engine.protocol import FinishReason, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler
from nibble.service.gateway.served_model import ServedModel


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
    ("schema", "arguments"),
    [
        (
            {
                "$id": "https://example.com/city.json",
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "$defs": {"city": {"enum": ["Rome"]}},
            },
            '{"city":"Rome"}',
        ),
        ({"properties": {"a": {"const": {"$ref": "#/b"}}}, "required": ["a"]}, '{"a":{"$ref":"#/b"}}'),
        ({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False}, '{"a":{"a":{}}}'),
    ],
)
def test_references_of_a_schema_lead_where_they_did(
    tool_model: ServedModel, tmp_path: Path, name: str, schema: dict[str, Any], arguments: str
) -> None:
    model = with_template(tool_model, ALL[name]) if name in ALL else tool_model
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}
    made = plan(model, tools=[tool], tool_choice="required")
    spec, style = made.requests[0].grammar, made.format and made.format.style
    assert spec is not None
    assert style is not None
    call = f'{{"name":"f","{style.arguments_key}":%s}}'
    call = {
        "hermes": f"<tool_call>\n{call}\n</tool_call>",
        "mistral": "[TOOL_CALLS]f[ARGS]%s" if style.is_named else f"[TOOL_CALLS][{call}]",
    }.get(style.name, call)
    thought = "" if not made.format.has_reasoning else "Hm.</think>" if made.format.is_thinking else "<think></think>"
    path = tmp_path / "tokenizer.json"
    model.tokenizer.save(str(path))
    compiler = GrammarCompiler(path, model.vocab_size, model.eos_token_ids)
    for text, is_taken in ((arguments, True), ('{"a":1,"city":""}', False)):
        token_ids = model.encode(thought + call % text)
        matcher = compiler.matcher(spec)
        assert (matcher.try_consume_tokens(token_ids) == len(token_ids)) == is_taken


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
