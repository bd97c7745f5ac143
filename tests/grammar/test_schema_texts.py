"""JSON schemas that are taken are enforced: random texts of real schemas and of random ones fit them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from walk import spec_of, validator, walk

from nibble.grammar.compiler import GrammarCompiler
from nibble.grammar.errors import GrammarError

Schema = dict[str, Any]

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
