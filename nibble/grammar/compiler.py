"""Grammars to matchers: which tokens of one tokenizer may come next.

A gateway compiles a grammar to refuse it before anything is queued, a worker compiles it again to enforce it; both do
it here, with the same tokenizer and the same limits, so that what one takes the other takes. The work is llguidance's
(https://github.com/guidance-ai/llguidance): an Earley parser over a lexer of derivatives, compiled lazily.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.bans import Tokens
from nibble.grammar.errors import GrammarError
from nibble.grammar.json_schema import prepare_schema

MAX_BYTES = {
    GrammarKind.JSON_SCHEMA: 128 << 10,
    GrammarKind.JSON_OBJECT: 0,
    GrammarKind.REGEX: 8 << 10,  # the time to build an automaton grows with the square
    GrammarKind.LARK: 32 << 10,
    GrammarKind.CHOICE: 64 << 10,
    GrammarKind.COMPOSED: 512 << 10,
}
# Between the tokens of JSON: what a writer of compact or of indented JSON puts there. Without a bound a weak model can
# write blanks until it runs out of tokens.
WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,64}"
# Ways to read a text, in Earley items. Where a client's grammar is ambiguous they become more with each token, and the
# time that a token takes grows with more than their square: an engine waits for that. Schemas can have many at no cost.
MAX_LARK_ROW_ITEMS, MAX_LARK_STEP_ITEMS = 500, 10_000
# What may follow a backslash. Without `u`: llguidance keeps the names of additional properties apart from those that a
# schema has by their spelling, and "\u0061" is another one of "a".
ESCAPES = 'nrbtf\\"'
_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": WHITESPACE,
    "json_allowed_escapes": ESCAPES,
}
_ROOT_ID = "schema:root"
_SEARCH_S = 0.5  # that is spent on finding where a schema is at fault; a part takes a millisecond or more
NUM_PROBED_TOKENS = 3
NUM_CACHED = 64  # matchers; one takes some 100 KiB
_MAX_MESSAGE_CHARS = 400
# How messages of llguidance begin that do not name the keyword, and that keyword.
_NAMELESS = {
    "oneOf constraints": "oneOf",
    "regex parse error": "pattern",
    "invalid multiple of": "multipleOf",
    "patternProperty regexes": "patternProperties",
}
_TEMPERATURE = re.compile(r"\[[^\]\n]*\btemperature\s*=")


class GrammarCompiler:
    """Makes matchers of one tokenizer. Safe to share between threads.

    Compile in a thread of `deep_stack_pool`: llguidance descends as deeply as a grammar is nested.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> None:
        """tokenizer_file: a `tokenizer.json`. vocab_size: the model's, which may be more than the tokenizer's. Nothing
        is read yet."""
        self.vocab_size = vocab_size
        self._tokenizer_file = tokenizer_file
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = Lock()
        self._matchers: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()  # unused ones
        self._matchers_lock = Lock()

    @property
    def tokenizer(self) -> LLTokenizer:
        """Built when it is first asked for, which takes about a second and holds the GIL. Raises GrammarError."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                try:
                    text = self._tokenizer_file.read_text(encoding="utf-8")
                    self._tokenizer = LLTokenizer(text, self.vocab_size, self._eos_token_ids or None)
                except (ValueError, OSError) as error:
                    message = f"text of this model's tokenizer cannot be constrained: {_short(str(error))}"
                    raise GrammarError(message) from error
            return self._tokenizer

    def matcher(self, spec: GrammarSpec) -> LLMatcher:
        """A matcher at the start of its text. Raises GrammarError."""
        with self._matchers_lock:
            known = self._matchers.get(spec)
            if known is not None:
                self._matchers.move_to_end(spec)
                return known.deep_copy()
        matcher = self._compile(spec)
        with self._matchers_lock:
            self._matchers[spec] = matcher
            if len(self._matchers) > NUM_CACHED:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()

    def special_token(self, text: str) -> int | None:
        """The id of a token that is not text in a grammar: in Lark it is written <[id]>. Raises GrammarError."""
        token_ids = self.tokenizer.tokenize_str(text)
        return token_ids[0] if len(token_ids) == 1 and self.tokenizer.is_special_token(token_ids[0]) else None

    def first_tokens(self, spec: GrammarSpec) -> Tokens | None:
        """What a text can begin with; None if it may be empty. Raises GrammarError."""
        matcher = self.matcher(spec)
        return None if matcher.is_accepting() else _allowed(matcher)[: self.vocab_size]

    def check(self, spec: GrammarSpec) -> None:
        """Raise GrammarError if the grammar cannot be enforced. Its first tokens are tried too, as grammars compile
        lazily: some turn out to be too large, or to allow nothing, only then."""
        matcher, ends = self.matcher(spec), frozenset(self.tokenizer.eos_tokens)
        for _ in range(NUM_PROBED_TOKENS):
            if matcher.is_stopped():
                break
            allowed = np.flatnonzero(_allowed(matcher))
            text = next((int(token_id) for token_id in allowed if int(token_id) not in ends), None)
            if text is None or not matcher.consume_token(text):
                break
        if matcher.is_error():
            raise GrammarError(_message(matcher))

    def _compile(self, spec: GrammarSpec) -> LLMatcher:
        matcher = self._matcher(_grammars(spec))
        if matcher.is_error():
            place = self._place(spec, matcher) if spec.kind is GrammarKind.JSON_SCHEMA else ""
            raise GrammarError(_message(matcher) + place)
        if warnings := matcher.get_grammar_warnings():
            raise GrammarError(_short("; ".join(warnings)))
        return matcher

    def _matcher(self, grammars: list[dict[str, Any]]) -> LLMatcher:
        parts = grammars[1:] or grammars  # the first of several puts the others together, and is no client's
        has_lark = any("lark_grammar" in part for part in parts)
        limits = LLParserLimits(
            max_items_in_row=MAX_LARK_ROW_ITEMS if has_lark else None,
            step_max_items=MAX_LARK_STEP_ITEMS if has_lark else None,
            verbose_errors=False,
        )
        return LLMatcher(self.tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)

    def _place(self, spec: GrammarSpec, refused: LLMatcher) -> str:
        """Where a schema is at fault: the innermost part that is refused by itself for the same reason."""
        schema = _read_json(spec.text)
        if not isinstance(schema, dict):
            return ""
        places, until_s = prepare_schema(schema), time.monotonic() + _SEARCH_S
        root = {"$id": _ROOT_ID, **schema}
        for place in reversed(places):
            if time.monotonic() > until_s:
                break
            part = {"$ref": f"{root['$id']}{quote(place, safe='#/~')}", "$defs": {"root": root}}
            matcher = self._matcher([{"json_schema": {**part, "x-guidance": _JSON_OPTIONS}}])
            if matcher.is_error() and _reason(matcher) == _reason(refused):
                return f" (at {place})"
        return ""


def _allowed(matcher: LLMatcher) -> Tokens:
    """What may come next; padding of the vocabulary may follow."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(mask, bitorder="little").view(np.bool_)


def _grammars(spec: GrammarSpec) -> list[dict[str, Any]]:
    """As llguidance reads them; the first one is the text's, and can refer to the others. Raises GrammarError."""
    num_bytes, limit = len(spec.text.encode()), MAX_BYTES[spec.kind]
    if num_bytes > limit:
        raise GrammarError(f"it has {num_bytes} bytes, the limit is {limit}")
    if spec.kind is not GrammarKind.COMPOSED:
        return [_grammar(spec)]
    composed = _read_json(spec.text)
    parts = composed["parts"].items()
    return [
        {"lark_grammar": composed["lark"]},
        *({"name": name, **_grammar(GrammarSpec(GrammarKind(kind), text))} for name, (kind, text) in parts),
    ]


def _grammar(spec: GrammarSpec) -> dict[str, Any]:
    match spec.kind:
        case GrammarKind.JSON_SCHEMA:
            return _json_grammar(_read_json(spec.text))
        case GrammarKind.JSON_OBJECT:
            return _json_grammar({"type": "object"})
        case GrammarKind.REGEX:
            grammar: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(spec.text))["grammars"][0]
            return {"lark_grammar": grammar["lark_grammar"]}
        case GrammarKind.LARK:
            if match := _TEMPERATURE.search(spec.text):
                line = spec.text.count("\n", 0, match.start()) + 1
                raise GrammarError(f"temperature at line {line} cannot be enforced")
            return {"lark_grammar": spec.text}
        case GrammarKind.CHOICE:
            return {"lark_grammar": f"start: CHOICE\nCHOICE: {_alternatives(_read_json(spec.text))}"}
        case GrammarKind.COMPOSED:
            raise AssertionError("a composed grammar is no part of another")


def _json_grammar(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"a schema is an object or a boolean, got {type(schema).__name__}")
    prepare_schema(schema)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _JSON_OPTIONS}
    return {"json_schema": schema}


def _alternatives(choices: Any) -> str:
    if not isinstance(choices, list) or not choices:
        raise GrammarError("a choice is a list of one string or more")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise GrammarError(f"choice {i} is not a string of one character or more")
    return " | ".join(json.dumps(choice) for choice in choices)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"it is not JSON: {error}") from error


def _message(matcher: LLMatcher) -> str:
    message = _reason(matcher)
    if message.startswith("NoExtension"):
        return "no text fits it"
    for beginning, keyword in _NAMELESS.items():
        if message.startswith(beginning):
            return _short(f"{keyword}: {message.partition('. Enable')[0]}")
    return _short(message)


def _reason(matcher: LLMatcher) -> str:
    """Without what follows: states of the parser, and references that led there."""
    return matcher.get_error().partition("\n<")[0].partition("\n  while processing")[0]


def _short(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + "..."
