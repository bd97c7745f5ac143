"""JSON schemas: what is refused, by name and place, and what is not."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from walk import spec_of

from nibble.grammar.compiler import GrammarCompiler
from nibble.grammar.errors import GrammarError
from nibble.grammar.json_schema import MAX_LEVELS, prepare_schema

ROOT = Path(__file__).parents[2]
Schema = dict[str, Any]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems at # cannot be enforced"),
        (
            {"type": "object", "properties": {"a/b": {"type": "array", "contains": {"type": "integer"}}}},
            "contains at #/properties/a~1b cannot be enforced",
        ),
        ({"anyOf": [{"type": "null"}, {"not": {"type": "string"}}]}, "not at #/anyOf/1 cannot be enforced"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"if": True, "then": False}}}, "if at #/$defs/a cannot be enforced"),
        ({"$ref": "#x", "$defs": {"a": {"$anchor": "x", "propertyNames": {}}}}, "propertyNames at #/$defs/a"),
        ({"items": {"dependentRequired": {"a": ["b"]}}}, "dependentRequired at #/items cannot be enforced"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties at #"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding at # cannot be enforced"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "cannot be enforced"),
        ({"x-guidance": {"lenient": True}}, "x-guidance at # cannot be enforced"),
        ({"type": "object", "minProperties": 2}, "minProperties at # cannot be enforced: it is 2, with 0 required"),
        ({"const": [{"a": 2**53 + 1}]}, "9007199254740993 at #/const cannot be enforced: it is beyond 2^53"),
        ({"const": -(2**63)}, "beyond 2^53"),  # llguidance's stack overflows
        ({"type": "integer", "maximum": 2**63 - 1}, "9223372036854775807 at #/maximum cannot be enforced"),
        ({"type": "string", "pattern": "a" * 8193}, "a pattern at # has 8193 characters, the limit is 8192"),
        ({"const": ["a\x01"]}, "the character U+0001 at #/const cannot be enforced"),
        ({"enum": [{"k": "\x7f"}]}, "the character U+007F at #/enum cannot be enforced"),
        ({"items": {"type": "string", "pattern": "^\\x00"}}, "a control character in a pattern at #/items"),
        ({"type": "string", "pattern": "[\\u0001]|\\a"}, "a control character in a pattern at #"),
        ({"type": "string", "pattern": "^(a"}, "unclosed group"),
        ({"properties": {"a/b": {"type": "string", "pattern": "(?=a)b"}}}, "pattern: regex parse error"),
        ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
        ({"allOf": [{"properties": {"a/b": {"format": "zip"}}}]}, "Unknown format: zip (at #/allOf/0/properties/a~1b)"),
        ({"$ref": "#/$defs/é", "$defs": {"é": {"format": "zip"}}}, "Unknown format: zip (at #/$defs/é)"),
        ({"$id": "http://a/b", "items": {"format": "zip"}}, "Unknown format: zip (at #/items)"),
        (
            {"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
            "oneOf constraints are not supported (at #/items)",
        ),
        ({"$ref": "b#/x", "$defs": {"a": {"$id": "b", "$defs": {"c": {"not": {}}}}}}, "not at #/$defs/a/$defs/c"),
        (
            {"properties": {"a": {"$id": "b", "$ref": "#/$defs/c", "$defs": {"c": {"contentEncoding": "x"}}}}},
            "contentEncoding at #/properties/a/$defs/c cannot be enforced",
        ),
        ({"$ref": "http://example.com/schema.json"}, "http://example.com/schema.json"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "text"}, "Invalid type: text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "greater than maximum"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        ({"properties": []}, "properties must be an object"),
        ({"$ref": "#"}, "no text fits it"),
        (False, "Unsatisfiable"),
        ([], "a schema is an object or a boolean, got list"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(compiler: GrammarCompiler, schema: Any, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.check(spec_of(schema))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"not": {"type": "integer"}, "if": {"type": "null"}}, "required": ["not"]},
        {"enum": [{"uniqueItems": True}]},
        {"type": "integer", "$defs": {"unused": {"not": {}}}},
        {"type": "object", "required": ["a", "b"], "minProperties": 3},
        True,
        {},
    ],
)
def test_words_that_are_no_keywords_are_no_reason_to_refuse(compiler: GrammarCompiler, schema: Any) -> None:
    compiler.check(spec_of(schema))


def object_of(num_properties: int, num_required: int = 0, **keywords: Any) -> dict[str, Any]:
    """The first of the properties are required."""
    names = [f"p{i}" for i in range(num_properties)]
    properties: dict[str, Any] = {name: {"type": "integer"} for name in names}
    return {"type": "object", "properties": properties, "required": names[:num_required], **keywords}


@pytest.mark.parametrize("keywords", [{}, {"additionalProperties": False}])
def test_as_many_optional_properties_as_are_taken_can_be_written(
    compiler: GrammarCompiler, keywords: dict[str, Any]
) -> None:
    for num_required in (0, 520):
        schema = object_of(480 + num_required, num_required, **keywords)
        matcher = compiler.matcher(spec_of(schema))
        names = list(schema["properties"])
        text = json.dumps(dict.fromkeys([*names[: num_required + 2], names[-1]], 1))
        assert matcher.consume_tokens(compiler.tokenizer.tokenize_str(text))
        assert not matcher.is_error()
    for schema in (object_of(481, **keywords), {"items": object_of(1000, 519, **keywords)}):
        with pytest.raises(GrammarError, match=r"properties at .* cannot be enforced: 481 in a row are not required"):
            compiler.check(spec_of(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer", "not": False}, "uniqueItems": False},
        {"type": "object", "propertyNames": True, "unevaluatedProperties": True, "dependentRequired": {}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "uniqueItems": False, "unevaluatedItems": True}}},
    ],
)
def test_keywords_that_forbid_nothing_are_no_reason_to_refuse(compiler: GrammarCompiler, schema: Any) -> None:
    compiler.check(spec_of(schema))


def test_a_value_that_only_looks_like_one_that_forbids_nothing_is_refused(compiler: GrammarCompiler) -> None:
    for schema in ({"type": "array", "uniqueItems": 0}, {"type": "object", "propertyNames": {}}):
        with pytest.raises(GrammarError, match="cannot be enforced"):
            compiler.check(spec_of(schema))


def accepts(compiler: GrammarCompiler, schema: Schema, text: str) -> bool:
    matcher = compiler.matcher(spec_of(schema))
    token_ids = compiler.tokenizer.tokenize_bytes(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def test_the_name_of_a_property_cannot_be_written_in_another_way(compiler: GrammarCompiler) -> None:
    """Or it would be taken for that of an additional one, whose value can be anything."""
    own = {"properties": {"a": {"type": "integer"}, "\n": {"type": "integer"}}}
    patterns = {"patternProperties": {"^🐲$": {"type": "integer"}}}
    for schema, text in ((own, '{"%s":"x"}'), (patterns, '{"%s":"x"}')):
        assert accepts(compiler, schema, text % "b")
        assert accepts(compiler, schema, text % "\\\\\\t")
        for name in ("a", "\\u0061", "\\n", "\\u000a") if schema is own else ("🐲", "\\ud83d\\udc32"):
            assert not accepts(compiler, schema, text % name), name


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("^[\\x00-\\x7f]x$", ["ax", "\nx"]),
        ("^[^\\x00]x$", ["éx"]),
        ("^\\\\x00$", ["\\x00"]),
        ("^\\n\\t$", ["\n\t"]),
    ],
)
def test_classes_with_control_characters_are_patterns_as_others(
    compiler: GrammarCompiler, pattern: str, texts: list[str]
) -> None:
    schema = {"type": "string", "pattern": pattern}
    compiler.check(spec_of(schema))
    for text in texts:
        assert accepts(compiler, schema, json.dumps(text, ensure_ascii=False))
    assert not accepts(compiler, schema, '"x"')


@given(st.dates(), st.sampled_from(["02-29", "02-30", "04-31", "12-31", "00-10", "13-01"]))
def test_dates_are_those_of_the_calendar(compiler: GrammarCompiler, day: datetime.date, other: str) -> None:
    for text in (day.isoformat(), f"{day.year:04}-{other}", f"0000-{other}"):
        try:
            is_date = bool(datetime.date.fromisoformat(text))
        except ValueError:
            is_date = False
        for name, rest in (("date", ""), ("date-time", "T23:59:59.5+05:30")):
            schema = {"type": "string", "format": name, "allOf": [{"minLength": 1}]}
            assert accepts(compiler, schema, f'"{text}{rest}"') == is_date, text


def test_minutes_have_60_seconds(compiler: GrammarCompiler) -> None:
    for name, day in (("time", ""), ("date-time", "2024-02-29T")):
        assert accepts(compiler, {"format": name}, f'"{day}23:59:59Z"')
        assert not accepts(compiler, {"format": name}, f'"{day}23:59:60Z"')
        assert accepts(compiler, {"format": name}, "1")  # a format is one of strings alone


def chain(num_levels: int, wrap: str = "items") -> Schema:
    definitions: Schema = {f"a{i}": {wrap: {"$ref": f"#/$defs/a{i + 1}"}} for i in range(num_levels)}
    return {"$ref": "#/$defs/a0", "$defs": {**definitions, f"a{num_levels}": {"type": "integer"}}}


def test_a_chain_of_references_counts_as_nesting() -> None:
    prepare_schema(chain(MAX_LEVELS // 2 - 2))
    with pytest.raises(GrammarError, match="nested more than 1024 levels deep, at #/"):
        prepare_schema(chain(MAX_LEVELS))


@pytest.mark.parametrize("wrap", ["items", "additionalProperties"])
def test_the_deepest_schema_allowed_does_not_end_the_process(tmp_path: Path, wrap: str) -> None:
    """In a process of its own: a stack that overflows is no exception. The main thread stands for a usual one."""
    code = f"""
import sys; sys.path[:0] = ["tests", "tests/grammar"]
from pathlib import Path
from tiny_tokenizer import write_tiny_tokenizer
from test_json_schema import MAX_LEVELS, chain
from walk import make_compiler, spec_of
from nibble.grammar.threads import deep_stack_pool
directory = Path({str(tmp_path)!r})
write_tiny_tokenizer(directory)
compiler = make_compiler(directory)
deep_stack_pool(1, "t").submit(compiler.check, spec_of(chain(MAX_LEVELS // 2 - 2, {wrap!r}))).result()
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n", (done.returncode, done.stderr)
