"""Random texts of a grammar: what a model that knows nothing would write under its masks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler


class Walk(NamedTuple):
    """is_complete: the grammar takes the text as it is."""

    text: bytes
    is_complete: bool


def walk(compiler: GrammarCompiler, spec: GrammarSpec, seed: int, max_tokens: int = 250) -> Walk:
    """Tokens drawn at random of those allowed, with a liking for what closes something."""
    rng = random.Random(seed)
    tokenizer, matcher = compiler.tokenizer, compiler.matcher(spec)
    closing = [tokenizer.tokenize_str(text)[0] for text in '"}]']
    tokens: list[int] = []
    while not matcher.is_stopped() and len(tokens) < max_tokens:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [token_id for token_id in np.flatnonzero(bits).tolist() if token_id not in tokenizer.eos_tokens]
        if not allowed or (matcher.is_accepting() and rng.random() < 0.3):
            break
        closers = [token_id for token_id in closing if bits[token_id]]
        tokens.append(rng.choice(closers if closers and rng.random() < 0.4 else allowed))
        assert matcher.consume_token(tokens[-1]), matcher.get_error()
    assert not matcher.is_error(), matcher.get_error()
    return Walk(tokenizer.decode_bytes(tokens), matcher.is_accepting())


def spec_of(schema: Any) -> GrammarSpec:
    return GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def make_compiler(directory: Path) -> GrammarCompiler:
    """For the tokenizer that `write_tiny_tokenizer` wrote there."""
    return GrammarCompiler(directory / "tokenizer.json", vocab_size=300, eos_token_ids=[2])


def validator(schema: Any) -> jsonschema.protocols.Validator:
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    cls.check_schema(schema)
    checker: jsonschema.protocols.Validator = cls(schema)
    return checker
