"""Bans that contradict a grammar, or one another, end their request and are named: the model is not to blame."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from constrained import PLENTY, VOCAB_SIZE, Output, request, run, schema
from late_kernels import LateKernels
from tiny_models import make_tiny_llama
from tiny_tokenizer import EOS, write_tiny_tokenizer
from tokenizers import Tokenizer

from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GrammarKind, GrammarSpec
from nibble.kernels.cpu.backend import CPUKernels

PERSON = schema(
    {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"], "additionalProperties": False}
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(
    scope="module",
    params=[(CPUKernels, "off"), (LateKernels, "off"), (LateKernels, "ngram")],
    ids=["synchronous", "asynchronous", "drafting"],
)
def engine(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    directory: Path = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=512)
    write_tiny_tokenizer(directory)
    make_kernels, method = request.param
    kernels = make_kernels(num_threads=2)
    limits = EngineLimits(PLENTY, max_num_sequences=8, speculation=SpeculationMethod(method))
    yield LLMEngine.from_checkpoint(directory, kernels, limits)
    kernels.close()


def ban(tokenizer: Tokenizer, text: str) -> tuple[tuple[int, float], ...]:
    return tuple((token_id, -math.inf) for token_id in tokenizer.encode(text).ids)


def check_failure(engine: LLMEngine, output: Output, *fields: str) -> None:
    assert output.reason is FinishReason.ERROR
    assert output.error_fields == fields
    assert output.error == f"no token is left to draw: {' and '.join(fields)} forbid all"
    assert engine.stats.num_nonfinite_logits == 0


def test_what_contradicts_the_grammar_from_the_first_token_on(engine: LLMEngine) -> None:
    outputs = run(engine, request("bad", PERSON, allowed_token_ids=(5, 6, 7)), request("good", None, max_tokens=9))
    check_failure(engine, outputs["bad"], "allowed_token_ids", "grammar")
    assert (len(outputs["good"].tokens), outputs["good"].error) == (9, None)


def test_what_contradicts_it_further_on_keeps_the_text_before(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.CHOICE, '["xyz"]')
    output = run(engine, request("a", spec, logit_bias=ban(tokenizer, "z"), min_tokens=2))["a"]
    check_failure(engine, output, "logit_bias", "grammar")
    assert tokenizer.decode(output.tokens) == "xy"


def test_bad_words_of_several_tokens(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    word = tuple(tokenizer.encode("yz").ids)
    spec = GrammarSpec(GrammarKind.CHOICE, '["xyz"]')
    output = run(engine, request("a", spec, bad_words_token_ids=(word,)))["a"]
    check_failure(engine, output, "bad_words_token_ids", "grammar")
    assert tokenizer.decode(output.tokens) == "xy"


def test_where_the_grammar_leaves_another_way_it_is_taken(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.CHOICE, '["xyz", "xyw"]')
    output = run(engine, request("a", spec, bad_words_token_ids=(tuple(tokenizer.encode("yz").ids),)))["a"]
    assert (tokenizer.decode(output.tokens), output.reason) == ("xyw", FinishReason.STOP)


@pytest.mark.parametrize("more", [{}, {"min_tokens": 20}])
def test_a_text_that_is_complete_ends_there(engine: LLMEngine, tokenizer: Tokenizer, more: dict[str, Any]) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "x(yz)*")
    output = run(engine, request("a", spec, logit_bias=(*ban(tokenizer, "y"), (EOS, -math.inf)), **more))["a"]
    assert output == Output(tokenizer.encode("x").ids, FinishReason.STOP)


def test_bad_words_that_leave_nothing_without_a_grammar(engine: LLMEngine) -> None:
    words = ((5, 5), (6, 5), (5, 6), (6, 6))
    output = run(engine, request("a", None, allowed_token_ids=(5, 6), bad_words_token_ids=words))["a"]
    check_failure(engine, output, "allowed_token_ids", "bad_words_token_ids")
    assert len(output.tokens) == 1


def test_a_resumed_request_comes_to_the_same_end(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.CHOICE, '["xyz"]')
    item = request("a", spec, logit_bias=ban(tokenizer, "z"))
    output = run(engine, item, generated=tuple(tokenizer.encode("xy").ids))["a"]
    check_failure(engine, output, "logit_bias", "grammar")
    assert output.tokens == []
