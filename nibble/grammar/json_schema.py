"""What of a JSON schema llguidance does not enforce, found before it could be passed over in silence.

llguidance refuses most of what it cannot do, but says no place; some things it ignores or rounds, and a schema that is
nested deeply enough overflows its stack, which ends the process. So the schema is walked here first: every schema that
can be reached from the root, through `$ref` too. What is well-formed is left to llguidance to say.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md, and tests/grammar/test_json_schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from nibble.grammar.errors import GrammarError

MAX_LEVELS = 1024  # of nesting, those of all schemas that are referred to added up: 16 KiB of stack each were seen
MAX_PATTERN_CHARS = 8192  # the time to build an automaton grows with the square
MAX_EXACT = 2**53  # llguidance computes with float64

_NOT_ENFORCED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "propertyNames",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$recursiveRef",
        # ignored in silence:
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "disallow",  # this and the next two are of draft 3
        "extends",
        "divisibleBy",
        # options of llguidance, one of which turns its refusals off:
        "x-guidance",
    }
)
# Values of those with which they forbid nothing: the keyword is taken out. (Generators of schemas write them.)
_FORBID_NOTHING: dict[str, Any] = {
    "uniqueItems": False,
    "not": False,
    "propertyNames": True,
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
    "dependencies": {},
    "dependentRequired": {},
    "dependentSchemas": {},
}
_MAPS_OF_SCHEMAS = ("properties", "patternProperties")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def prepare_schema(schema: Any) -> None:
    """Take keywords that forbid nothing out of a schema, in place.

    Raises GrammarError for the first thing that would not be enforced; it is named with its place.
    """
    levels = 0
    seen = {"#"}
    roots = [("#", schema)]
    while roots:
        root_path, root = roots.pop()
        deepest = 0
        pending = [(root_path, root, 1)]
        while pending:
            path, node, level = pending.pop()
            deepest = max(deepest, level)
            if levels + deepest > MAX_LEVELS:
                raise GrammarError(f"the schema is nested more than {MAX_LEVELS} levels deep, at {path}")
            if not isinstance(node, dict):
                continue
            for keyword, value in _FORBID_NOTHING.items():
                if keyword in node and node[keyword] == value and type(node[keyword]) is type(value):
                    del node[keyword]
            _check_keywords(path, node)
            pending += [(child_path, child, level + 1) for child_path, child in _children(path, node)]
            for target_path, target in _resolve(schema, node.get("$ref")):
                if target_path not in seen:
                    seen.add(target_path)
                    roots.append((target_path, target))
        levels += deepest


def _check_keywords(path: str, schema: Mapping[str, Any]) -> None:
    for keyword in schema:
        if keyword in _NOT_ENFORCED:
            raise GrammarError(f"{keyword} at {path} cannot be enforced")
    for keyword in _NUMBERS:
        if keyword in schema:
            _check_numbers(f"{path}/{keyword}", schema[keyword])
    _check_least_properties(path, schema)
    patterns = schema.get("patternProperties")
    for pattern in [schema.get("pattern"), *(patterns if isinstance(patterns, Mapping) else ())]:
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
            raise GrammarError(f"a pattern at {path} has {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}")


def _check_numbers(path: str, value: Any) -> None:
    """Also those inside of lists and objects."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, int) and abs(value) > MAX_EXACT:
            raise GrammarError(f"the number {value} at {path} cannot be enforced: it is beyond 2^53")
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def _check_least_properties(path: str, schema: Mapping[str, Any]) -> None:
    """Names of additional properties may be the same one, and then count once."""
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least > num_required + 1:
        raise GrammarError(
            f"minProperties at {path} cannot be enforced: it is {least}, with {num_required} required properties it "
            f"can be {num_required + 1} at most"
        )


def _children(path: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword in _MAPS_OF_SCHEMAS:
        if isinstance(value := schema.get(keyword), Mapping):
            yield from ((f"{path}/{keyword}/{_escape(name)}", child) for name, child in value.items())
    for keyword in _SCHEMAS:
        if isinstance(value := schema.get(keyword), Mapping):
            yield f"{path}/{keyword}", value
    for keyword in _LISTS_OF_SCHEMAS:
        if isinstance(value := schema.get(keyword), list):
            yield from ((f"{path}/{keyword}/{i}", child) for i, child in enumerate(value))


def _resolve(schema: Any, target: Any) -> list[tuple[str, Any]]:
    """The schema that a reference names. Broken ones are left to llguidance, which has no network: it finds what the
    schema itself holds, or refuses."""
    if not isinstance(target, str) or target == "#":
        return []
    if not target.startswith("#/"):
        return _definitions(schema)
    node = schema
    for part in unquote(target[2:]).split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return []
    return [(target, node)]


def _definitions(schema: Any) -> list[tuple[str, Any]]:
    """A reference by name may mean any definition, so all of them are looked at."""
    return [
        (f"#/{keyword}/{_escape(name)}", child)
        for keyword in ("$defs", "definitions")
        if isinstance(schema, Mapping) and isinstance(schema.get(keyword), Mapping)
        for name, child in schema[keyword].items()
    ]


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
