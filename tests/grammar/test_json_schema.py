"""JSON schemas: what is refused, by name and place, and that whatever is taken is enforced."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walk import validator, walk

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler
from nibble.grammar.errors import GrammarError
from nibble.grammar.json_schema import MAX_LEVELS, prepare_schema

ROOT = Path(__file__).parents[2]
Schema = dict[str, Any]


def spec_of(schema: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema))


# As in JSONSchemaBench (https://github.com/guidance-ai/jsonschemabench): what real APIs and tools ask for.
BENCH: dict[str, Schema] = {
    "nested": {
        "type": "object",
        "properties": {
            "user": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
            "tags": {"type": "array", "items": {"enum": ["a", "b", "ß"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["user", "tags"],
        "additionalProperties": False,
    },
    "enums": {"enum": ["red", "grün", 3, 4.5, None, True, {"a": [1]}, ["x"]]},
    "const": {"type": "object", "properties": {"v": {"const": {"k": [1, None]}}}, "required": ["v"]},
    "patterns": {
        "type": "object",
        "properties": {
            "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
            "zip": {"type": "string", "pattern": "^\\d{5}(-\\d{4})?$"},
        },
        "required": ["sku", "zip"],
    },
    "lengths": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 4}, "maxItems": 2},
    "ranges": {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "minimum": -7, "exclusiveMaximum": 12},
            {"type": "number", "exclusiveMinimum": -0.5, "maximum": 1.25},
            {"type": "integer", "multipleOf": 7, "minimum": 0},
        ],
        "items": False,
        "minItems": 3,
    },
    "any of": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}, {"type": "null"}]},
    "one of, told apart by a constant": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": k}, "v": v}, "required": ["k", "v"]}
            for k, v in (("s", {"type": "string"}), ("i", {"type": "integer"}))
        ]
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "definitions": {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "$defs": {"point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}},
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
    },
    "unicode": {
        "type": "object",
        "properties": {'naïve "key"\n': {"enum": ["日本語", "\u2028", "🎉", "a\\b/c"]}},
        "required": ['naïve "key"\n'],
        "additionalProperties": False,
    },
    "formats": {"type": "array", "prefixItems": [{"type": "string", "format": f} for f in ("date", "uuid", "ipv4")]},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
    },
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x_": {"type": "integer"}},
        "additionalProperties": False,
        "minProperties": 1,
    },
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"$ref": "#/definitions/flag"}],
        "additionalItems": {"type": "string"},
        "minItems": 2,
        "definitions": {"flag": {"type": "boolean"}},
    },
    "references by names that are no URI": {
        "type": "array",
        "items": {"$ref": "#/$defs/Größe[int]"},
        "$defs": {"Größe[int]": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/a~1b"}]}, "a/b": {"const": "x"}},
    },
    "annotations": {"title": "T", "description": "D", "default": 1, "examples": [1], "type": "integer", "x-order": 1},
}


@pytest.mark.parametrize("name", BENCH)
def test_every_text_fits_its_schema(compiler: GrammarCompiler, name: str) -> None:
    schema, checker = BENCH[name], validator(BENCH[name])
    compiler.check(spec_of(schema))
    walks = [walk(compiler, spec_of(schema), seed) for seed in range(40)]
    complete = [done.text for done in walks if done.is_complete]
    assert len(complete) > 10
    for text in complete:
        checker.validate(json.loads(text))


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
from test_json_schema import MAX_LEVELS, chain, spec_of
from walk import make_compiler
from nibble.grammar.threads import deep_stack_pool
directory = Path({str(tmp_path)!r})
write_tiny_tokenizer(directory)
compiler = make_compiler(directory)
deep_stack_pool(1, "t").submit(compiler.check, spec_of(chain(MAX_LEVELS // 2 - 2, {wrap!r}))).result()
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n", (done.returncode, done.stderr)


names = st.sampled_from(["a", "b", "ab", "é", 'q"', "not", "$ref"])
bounds = st.integers(-50, 50)


def numbers(kind: str) -> st.SearchStrategy[Schema]:
    limits = st.tuples(bounds, bounds).map(sorted)
    return st.one_of(
        st.just({"type": kind}),
        limits.map(lambda pair: {"type": kind, "minimum": pair[0], "maximum": pair[1]}),
        limits.map(lambda pair: {"type": kind, "exclusiveMinimum": pair[0], "exclusiveMaximum": pair[1] + 2}),
        st.integers(1, 9).map(lambda step: {"type": kind, "multipleOf": step}),
        bounds.map(lambda least: {"type": kind, "minimum": least / 4}),
    )


strings = st.one_of(
    st.just({"type": "string"}),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": sum(pair)}
    ),
    st.sampled_from(["^[ab]+$", "^a?b{1,3}$", "x", "^(é|ü|\\d)*$", '^[^"\\\\]{2}$', "\\.$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(["date", "time", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-999, 999)
    | st.floats(-10, 10).map(lambda x: round(x, 2))
    | st.text('aé"\\\n'),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
leaves = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}, {}]),
    numbers("integer"),
    numbers("number"),
    strings,
    values.map(lambda value: {"const": value}),
    st.lists(values, min_size=1, max_size=3).map(lambda options: {"enum": options}),
)


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    properties = draw(st.dictionaries(names, inner, max_size=3))
    schema: Schema = {"type": "object", "properties": properties}
    if properties:
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    additional = draw(st.sampled_from([None, False, {"type": "integer"}]))
    if additional is not None:
        schema["additionalProperties"] = additional
    for keyword in draw(st.lists(st.sampled_from(["minProperties", "maxProperties"]), max_size=1)):
        schema[keyword] = draw(st.integers(0, 3))
    return schema


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    schema: Schema = {"type": "array", "items": draw(inner | st.just(False))}
    if draw(st.booleans()):
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
    least = draw(st.integers(0, 2))
    return {**schema, "minItems": least, "maxItems": least + draw(st.integers(0, 2))}


def combined(inner: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        objects(inner),
        arrays(inner),
        st.tuples(st.sampled_from(["anyOf", "oneOf", "allOf"]), several).map(lambda pair: {pair[0]: pair[1]}),
        st.tuples(inner, st.sampled_from(["anyOf", "allOf"]), several).map(
            lambda three: {**three[0], three[1]: three[2]}
        ),
    )


schemas = st.recursive(leaves, combined, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_random_texts_fit_random_schemas_or_the_schema_is_refused(
    compiler: GrammarCompiler, schema: Schema, seed: int
) -> None:
    checker = validator(schema)
    try:
        compiler.check(spec_of(schema))
    except GrammarError:
        return
    for i in range(4):
        done = walk(compiler, spec_of(schema), seed + i, max_tokens=120)
        if done.is_complete:
            checker.validate(json.loads(done.text))
