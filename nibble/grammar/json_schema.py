"""What of a JSON schema llguidance does not enforce, found before it could be passed over in silence.

llguidance refuses most of what it cannot do, but says no place; some things it ignores or rounds, and a schema that is
nested deeply enough overflows its stack, which ends the process. So the schema is walked here first: every schema that
can be reached from the root, through `$ref` too. What is well-formed is left to llguidance to say.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md, and tests/grammar/test_json_schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from nibble.grammar.errors import GrammarError

MAX_LEVELS = 1024  # of nesting, those of all schemas that are referred to added up: 16 KiB of stack each were seen
MAX_PATTERN_CHARS = 8192  # the time to build an automaton grows with the square
# Any of those that may come next is tried with each byte: llguidance ends a text where these are about 500.
MAX_OPTIONAL_PROPERTIES = 480
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
# Patterns in the place of formats whose texts, as llguidance writes them, need not exist: it knows no leap years, and
# puts a 60th second everywhere. The years are those of Python's `datetime`.
_DAY = (
    r"(([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS = {"date": f"^{_DAY}$", "time": f"^{_TIME}$", "date-time": f"^{_DAY}T{_TIME}$"}
# Control characters that JSON can write as \u0000 alone, which is not allowed (ESCAPES in compiler.py): llguidance
# leaves them out of a constant in silence, and out of a pattern where they stand by themselves.
_UNWRITABLE = frozenset(map(chr, [*range(0x20), 0x7F])) - frozenset("\b\t\n\f\r")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]{1,6})\}|(a)|(v)|.)")
_OF_CLASS = rf"(?>{_ESCAPE.pattern}|[^\]\\])"
_CLASS_OF_SEVERAL = re.compile(rf"\[(?:\^{_OF_CLASS}+|{_OF_CLASS}{{2,}})\]")
_URI = "!#$%&'()*+,/:;=?@~"  # beside letters, digits and ._-
_MAPS_OF_SCHEMAS = ("properties", "patternProperties")
_SCHEMAS = ("items", "additionalItems", "additionalProperties")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_VALUES = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def prepare_schema(schema: Any) -> list[str]:
    """Take keywords that forbid nothing out of a schema, put patterns in the place of some formats, write references as
    URIs; in place.

    Returns the places of all schemas in it that count, those inside of others after these. Raises GrammarError for the
    first thing that would not be enforced; it is named with its place.
    """
    definitions = _definitions(schema)
    levels = 0
    places: list[str] = []
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
            places.append(path)
            _rewrite(node)
            _check_keywords(path, node)
            pending += [(child_path, child, level + 1) for child_path, child in _children(path, node)]
            for target_path, target in _resolve(schema, node.get("$ref"), definitions):
                if target_path not in seen:
                    seen.add(target_path)
                    roots.append((target_path, target))
        levels += deepest
    return places


def _rewrite(schema: dict[str, Any]) -> None:
    for keyword, value in _FORBID_NOTHING.items():
        if keyword in schema and schema[keyword] == value and type(schema[keyword]) is type(value):
            del schema[keyword]
    if isinstance(target := schema.get("$ref"), str):  # generators of schemas write names there that are no URI
        schema["$ref"] = quote(target, safe=_URI)
    pattern, parts = _PATTERNS.get(str(schema.get("format"))), schema.get("allOf", [])
    if pattern is not None and isinstance(parts, list):
        del schema["format"]
        schema["allOf"] = [*parts, {"pattern": pattern}]


def _check_keywords(path: str, schema: Mapping[str, Any]) -> None:
    for keyword in schema:
        if keyword in _NOT_ENFORCED:
            raise GrammarError(f"{keyword} at {path} cannot be enforced")
    for keyword in _VALUES:
        if keyword in schema:
            _check_values(f"{path}/{keyword}", schema[keyword])
    _check_least_properties(path, schema)
    _check_optional_properties(path, schema)
    patterns = schema.get("patternProperties")
    for pattern in [schema.get("pattern"), *(patterns if isinstance(patterns, Mapping) else ())]:
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
            raise GrammarError(f"a pattern at {path} has {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}")
        if isinstance(pattern, str) and _control_characters(pattern):
            raise GrammarError(f"a control character in a pattern at {path} cannot be enforced")


def _control_characters(pattern: str) -> frozenset[str]:
    """Those of a pattern that cannot be written, and stand there by themselves."""
    rest = _CLASS_OF_SEVERAL.sub("", pattern)
    characters = set(rest)
    for *codes, is_bell, is_tab in (escape.groups() for escape in _ESCAPE.finditer(rest)):
        code = next(filter(None, codes), "7" if is_bell else "b" if is_tab else "20")
        characters.add(chr(min(int(code, 16), 0x80)))
    return _UNWRITABLE & characters


def _check_values(path: str, value: Any) -> None:
    """Also those inside of lists and objects."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and (characters := _UNWRITABLE.intersection(value)):
            raise GrammarError(f"the character U+{ord(min(characters)):04X} at {path} cannot be enforced")
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


def _check_optional_properties(path: str, schema: Mapping[str, Any]) -> None:
    """Those up to the next required one may all come next."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or len(properties) <= MAX_OPTIONAL_PROPERTIES:
        return
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    longest = max(
        sum(1 for _ in run) if is_optional else 0
        for is_optional, run in groupby(properties, lambda name: name not in names)
    )
    if longest > MAX_OPTIONAL_PROPERTIES:
        raise GrammarError(
            f"properties at {path} cannot be enforced: {longest} in a row are not required, the limit is "
            f"{MAX_OPTIONAL_PROPERTIES}"
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


class _Definitions(NamedTuple):
    """Those of a schema at any depth. has_names: schemas below the root have names of their own, from which pointers
    inside of them start."""

    all: list[tuple[str, Any]]
    has_names: bool


def _resolve(schema: Any, target: Any, definitions: _Definitions) -> list[tuple[str, Any]]:
    """The schemas that a reference may mean: where it is not known which, all definitions. Broken ones are left to
    llguidance, which has no network: it finds what the schema itself holds, or refuses."""
    if not isinstance(target, str) or target == "#":
        return []
    if not target.startswith("#/"):
        return definitions.all
    others = definitions.all if definitions.has_names else []
    node = schema
    for part in unquote(target[2:]).split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return others
    return [(unquote(target), node), *others]


def _definitions(schema: Any) -> _Definitions:
    found: list[tuple[str, Any]] = []
    has_names = False
    pending = [("#", schema)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Mapping):
            has_names |= path != "#" and isinstance(node.get("$id", node.get("id")), str)
            for keyword in ("$defs", "definitions"):
                if isinstance(named := node.get(keyword), Mapping):
                    found += [(f"{path}/{keyword}/{_escape(name)}", child) for name, child in named.items()]
            pending += [(f"{path}/{_escape(name)}", child) for name, child in node.items()]
        elif isinstance(node, list):
            pending += [(f"{path}/{i}", child) for i, child in enumerate(node)]
    return _Definitions(found, has_names)


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
