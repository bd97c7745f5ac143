"""Limits of the compiler: a grammar takes an engine no more time than it may."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler

AMBIGUOUS = 'start: s\ns: s s | s s s | "a"'
COMPOSED = json.dumps({"lark": 'start: "" @content', "parts": {"content": ["lark", AMBIGUOUS]}})


def num_read(compiler: GrammarCompiler, matcher: LLMatcher, text: str) -> int:
    token_ids = compiler.tokenizer.tokenize_str(text)
    assert len(token_ids) == len(text)
    return next((i for i, token_id in enumerate(token_ids) if not matcher.consume_token(token_id)), len(token_ids))


@pytest.mark.parametrize(
    "spec",
    [GrammarSpec(GrammarKind.LARK, AMBIGUOUS), GrammarSpec(GrammarKind.COMPOSED, COMPOSED)],
    ids=["", "composed"],
)
def test_an_ambiguous_grammar_ends_before_a_token_takes_long(compiler: GrammarCompiler, spec: GrammarSpec) -> None:
    """Each byte takes longer than the one before: the 97th 4 ms, the 378th, which llguidance lets come, 106."""
    compiler.check(spec)
    matcher = compiler.matcher(spec)
    assert 50 < num_read(compiler, matcher, "a" * 200) < 120
    assert "items" in matcher.get_error()


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" | start "a"',
        'start: "a"+',
        'start: e\ne: e "a" e | "a"',  # ambiguous, but with one way less to grow
    ],
)
def test_long_texts_of_other_grammars_are_read(compiler: GrammarCompiler, grammar: str) -> None:
    matcher = compiler.matcher(GrammarSpec(GrammarKind.LARK, grammar))
    assert num_read(compiler, matcher, "a" * 150) == 150
