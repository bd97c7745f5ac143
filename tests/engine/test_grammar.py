"""Constrained decoding in the engine: with a random model, hot sampling and too little memory, outputs fit."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from constrained import BLOCK_BYTES, PLENTY, VOCAB_SIZE, Output, request, run, schema
from hypothesis import given, settings
from hypothesis import strategies as st
from late_kernels import LateKernels
from llguidance import LLMatcher
from msgspec.structs import replace
from tiny_models import make_tiny_llama
from tiny_tokenizer import EOS, write_tiny_tokenizer
from tokenizers import Tokenizer

from nibble.engine.errors import RequestError
from nibble.engine.grammar import Constraints
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, GrammarKind, GrammarSpec
from nibble.grammar.compiler import GrammarCompiler
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.slots import mask_words

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "ß", "🎉"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/p"}]},
    },
    "$defs": {"p": {"type": "array", "items": {"type": "string", "pattern": "^[ab]{2,9}$"}, "maxItems": 2}},
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=512)
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """Biases towards what closes something: a random model would not come to an end."""
    return tuple((tokenizer.encode(text).ids[0], 4.0) for text in '"}]')


@pytest.fixture(scope="module", params=[CPUKernels, LateKernels], ids=["synchronous", "asynchronous"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    kernels = request.param(num_threads=2)
    yield LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, max_num_sequences=8))
    kernels.close()


def check(output: Output, spec: GrammarSpec, tiny: Path, tokenizer: Tokenizer) -> bool:
    """Whether it is complete; then it fits, and what was cut is the beginning of something that does."""
    assert output.reason in (FinishReason.STOP, FinishReason.LENGTH), output
    text = [token_id for token_id in output.tokens if token_id != EOS]
    assert EOS not in output.tokens[:-1]
    matcher = GrammarCompiler(tiny / "tokenizer.json", VOCAB_SIZE, [EOS]).matcher(spec)
    assert matcher.validate_tokens(text) == len(text)
    if output.reason is FinishReason.LENGTH:
        return False
    assert matcher.consume_tokens(text)
    assert matcher.is_accepting()
    if spec.kind is GrammarKind.JSON_SCHEMA:
        jsonschema.validate(json.loads(tokenizer.decode(text)), json.loads(spec.text))
    return True


GRAMMARS = {
    "schema": schema(PERSON),
    "recursive": schema({"type": "array", "items": {"anyOf": [{"$ref": "#"}, {"type": "boolean"}]}, "maxItems": 2}),
    "object": GrammarSpec(GrammarKind.JSON_OBJECT),
    "regex": GrammarSpec(GrammarKind.REGEX, "(ab|é){2,}[0-9]?"),
    "lark": GrammarSpec(
        GrammarKind.LARK, 'start: "<" list ">"\nlist: item ("," item)*\nitem: /[0-9]{1,2}/ | "<" list ">"'
    ),
    "choice": GrammarSpec(GrammarKind.CHOICE, json.dumps(["yes", "no", 'p"\\\n', "ÿ🎉"])),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_every_output_fits_its_grammar(
    engine: LLMEngine, tiny: Path, tokenizer: Tokenizer, closing: tuple[tuple[int, float], ...], name: str
) -> None:
    requests = [request(f"r{i}", GRAMMARS[name], seed=i, logit_bias=closing if i % 2 else ()) for i in range(12)]
    outputs = run(engine, *requests)
    complete = [check(output, GRAMMARS[name], tiny, tokenizer) for output in outputs.values()]
    assert sum(complete) >= 4
    assert len({tuple(output.tokens) for output in outputs.values()}) > 2


LEAVES: list[dict[str, Any]] = [
    {"type": "integer"},
    {"type": "null"},
    {"enum": ["x", "ÿ", 1.5]},
    {"type": "string", "pattern": "^[a-c]+$"},
    {"type": "string", "maxLength": 3},
    {"type": "number", "minimum": 0, "maximum": 9},
]


def record(properties: dict[str, Any]) -> dict[str, Any]:
    required = sorted(properties)[:2]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


small_schemas = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3}),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(record),
    ),
    max_leaves=5,
)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_schemas_in_one_batch_with_too_little_memory(
    tiny: Path, tokenizer: Tokenizer, closing: tuple[tuple[int, float], ...], data: st.DataObject
) -> None:
    picked = data.draw(st.lists(small_schemas, min_size=1, max_size=6))
    seed, temperature = data.draw(st.integers(0, 2**63)), data.draw(st.sampled_from([0.0, 1.5]))
    requests = [
        request(f"{i}", schema(value), 60, seed=seed + i, temperature=temperature, logit_bias=closing, max_tokens=100)
        for i, value in enumerate(picked)
    ]
    kernels = LateKernels(num_threads=1)
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(6 * BLOCK_BYTES, max_num_sequences=8))
    outputs = run(engine, *requests)
    kernels.close()
    for item in requests:
        assert item.grammar is not None
        check(outputs[item.request_id], item.grammar, tiny, tokenizer)


def test_preempted_sequences_go_on_with_the_same_tokens(engine: LLMEngine, tiny: Path) -> None:
    requests = [request(f"{i}", schema(PERSON), 40, seed=i, max_tokens=60) for i in range(6)]
    expected = run(engine, *requests)
    kernels = LateKernels(num_threads=2)
    small = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(5 * BLOCK_BYTES, max_num_sequences=8))
    assert run(small, *requests) == expected
    assert small.stats.num_preemptions > 0
    kernels.close()


@pytest.mark.parametrize("name", ["schema", "regex", "lark"])
def test_a_resumed_request_goes_on_with_the_same_tokens(engine: LLMEngine, name: str) -> None:
    item = request("a", GRAMMARS[name], seed=3, max_tokens=80)
    whole = run(engine, item)["a"]
    for num_done in {1, len(whole.tokens) // 2, len(whole.tokens) - 1}:
        rest = run(engine, item, generated=tuple(whole.tokens[:num_done]))["a"]
        assert rest == Output(whole.tokens[num_done:], whole.reason)


def test_a_request_resumed_after_its_last_token_ends_without_another(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    done = tokenizer.encode("[true]").ids
    spec = schema({"type": "array", "items": {"const": True}, "minItems": 1, "maxItems": 1})
    assert run(engine, request("a", spec), generated=tuple(done))["a"] == Output([], FinishReason.STOP)


def test_free_sequences_beside_constrained_ones_keep_their_tokens(engine: LLMEngine) -> None:
    free = [request(f"free{i}", None, seed=i, max_tokens=40) for i in range(3)]
    alone = {item.request_id: run(engine, item)[item.request_id] for item in free}
    bound = [request(f"bound{i}", spec, seed=i, max_tokens=40) for i, spec in enumerate(GRAMMARS.values())]
    alone |= {item.request_id: run(engine, item)[item.request_id] for item in bound}
    assert run(engine, *free, *bound) == alone


def test_a_complete_text_ends_the_request_without_an_end_token(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.CHOICE, '["abc"]')
    output = run(engine, request("a", spec, max_tokens=len(tokenizer.encode("abc").ids)))["a"]
    assert tokenizer.decode(output.tokens) == "abc"
    assert (output.reason, EOS in output.tokens) == (FinishReason.STOP, False)


def test_the_end_token_comes_only_where_the_text_may_end(engine: LLMEngine, tokenizer: Tokenizer) -> None:
    spec = GrammarSpec(GrammarKind.REGEX, "(abc)*")
    for i in range(8):
        output = run(engine, request("a", spec, seed=i, max_tokens=50, logit_bias=((EOS, 6.0),)))["a"]
        text = tokenizer.decode(output.tokens)
        assert text == "abc" * (len(text) // 3)
        assert output.tokens[-1] == EOS


@pytest.mark.parametrize("params", [{"stop_token_ids": ()}, {"min_tokens": 30}], ids=["ignore_eos", "min_tokens"])
def test_where_no_end_token_may_come_the_text_goes_on(engine: LLMEngine, params: dict[str, Any]) -> None:
    output = run(engine, request("a", GrammarSpec(GrammarKind.REGEX, "a*"), max_tokens=30, **params))["a"]
    assert (len(output.tokens), output.reason) == (30, FinishReason.LENGTH)
    assert EOS not in output.tokens


@pytest.mark.parametrize("params", [{"stop_token_ids": ()}, {"min_tokens": 30}], ids=["ignore_eos", "min_tokens"])
def test_where_nothing_but_the_end_is_left_the_request_ends(engine: LLMEngine, params: dict[str, Any]) -> None:
    output = run(engine, request("a", GrammarSpec(GrammarKind.REGEX, "a{5}"), max_tokens=40, **params))["a"]
    assert output.reason is FinishReason.STOP
    empty = run(engine, request("a", GrammarSpec(GrammarKind.REGEX, ""), max_tokens=40, **params))["a"]
    assert empty == Output([], FinishReason.STOP)


def test_other_parameters_choose_among_what_the_grammar_allows(
    engine: LLMEngine, tiny: Path, tokenizer: Tokenizer
) -> None:
    spec = GRAMMARS["schema"]
    tuned = {"frequency_penalty": 1.0, "repetition_penalty": 1.3, "top_p": 0.9, "min_p": 0.01, "logprobs": 3}
    check(run(engine, request("a", spec, **tuned))["a"], spec, tiny, tokenizer)


def test_a_grammar_that_was_not_checked_fails_its_request_alone(engine: LLMEngine) -> None:
    outputs = run(
        engine,
        request("bad", GrammarSpec(GrammarKind.REGEX, "(")),
        request("special", GrammarSpec(GrammarKind.LARK, f'start: "a" <[{EOS}]> "b"')),
        request("good", None, max_tokens=5),
    )
    assert outputs["bad"].tokens == []
    assert "unclosed group" in str(outputs["bad"].error)
    assert outputs["special"].error_fields == ("grammar",)
    assert outputs["good"].error is None


class GatedCompiler(GrammarCompiler):
    """Makes no matcher before it is let."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory / "tokenizer.json", VOCAB_SIZE, [EOS])
        self.gate = threading.Event()
        self.asked: list[GrammarSpec] = []

    def matcher(self, spec: GrammarSpec) -> LLMatcher:
        self.asked.append(spec)
        assert self.gate.wait(30)
        return super().matcher(spec)


def test_grammars_that_take_their_time_hold_up_nobody_else(tiny: Path) -> None:
    """Nor do they keep the engine from taking requests, or from making room for an urgent one."""
    kernels = LateKernels(num_threads=1)
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(6 * BLOCK_BYTES, max_num_sequences=4))
    compiler = GatedCompiler(tiny)
    engine.constraints = Constraints(compiler)
    for i in range(4):
        engine.add(replace(request(f"slow{i}", GRAMMARS["regex"]), priority=-2))
        assert engine.capacity == 3 - i
    engine.add(replace(request("lesser", None, 190, max_tokens=40), priority=1))
    for _ in range(3):
        engine.step()
    free = run_until(engine, request("free", None, 190, max_tokens=20), "free")
    assert len(free.tokens) == 20
    assert engine.scheduler.num_preemptions == 1
    engine.abort("lesser")
    compiler.gate.set()
    while engine.has_unfinished:
        engine.step()
    kernels.close()


def test_the_grammars_of_requests_that_were_aborted_are_not_compiled(tiny: Path) -> None:
    kernels = LateKernels(num_threads=1)
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY))
    compiler = GatedCompiler(tiny)
    engine.constraints = Constraints(compiler)
    for name in GRAMMARS:
        engine.add(request(name, GRAMMARS[name]))
    while not compiler.asked:
        engine.step()
    for name in GRAMMARS:
        engine.abort(name)
    compiler.gate.set()
    first, last = GRAMMARS["schema"], GRAMMARS["choice"]
    assert run(engine, request("last", last))["last"].error is None
    assert compiler.asked == [first, last]
    kernels.close()


def run_until(engine: LLMEngine, item: GenerationRequest, request_id: str) -> Output:
    engine.add(item)
    tokens: list[int] = []
    while True:
        for event in engine.step():
            if event.request_id != request_id:
                continue
            tokens += event.token_ids
            if event.finish_reason is not None:
                return Output(tokens, event.finish_reason, event.error, event.error_fields)


def test_an_aborted_request_leaves_nothing(engine: LLMEngine) -> None:
    for num_steps in range(4):
        engine.add(request("a", GRAMMARS["schema"]))
        for _ in range(num_steps):
            engine.step()
        engine.abort("a")
    assert isinstance(engine.constraints, Constraints)
    assert not engine.constraints._constraints
    run(engine, request("a", None, max_tokens=3))


def test_without_a_tokenizer_grammars_are_refused(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, vocab_size=VOCAB_SIZE)
    kernels = CPUKernels(num_threads=1)
    engine = LLMEngine.from_checkpoint(tmp_path, kernels, EngineLimits(PLENTY))
    with pytest.raises(RequestError, match="no tokenizer file"):
        engine.add(request("a", GrammarSpec(GrammarKind.JSON_OBJECT)))
    kernels.close()


def test_masks_have_the_model_s_vocabulary(tiny: Path) -> None:
    compiler = GrammarCompiler(tiny / "tokenizer.json", VOCAB_SIZE, [EOS])
    mask = np.frombuffer(compiler.matcher(GrammarSpec(GrammarKind.REGEX, ".*")).compute_bitmask(), np.int32)
    assert len(mask) == mask_words(VOCAB_SIZE)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[271:].any()  # the tokenizer has no more
