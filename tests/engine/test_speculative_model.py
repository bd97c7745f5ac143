"""Speculation over a real decoder: the same tokens and log probabilities with drafts and without, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from late_kernels import LateKernels
from random_params import adjustments
from replay import ReplayDrafter
from tiny_models import make_tiny_llama
from tiny_tokenizer import EOS, write_tiny_tokenizer

from nibble.engine.limits import EngineLimits, SpeculationMethod
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.model_runner import ModelRunner
from nibble.engine.protocol import FinishReason, GenerationRequest, GrammarKind, GrammarSpec, SamplingParams
from nibble.engine.speculative import SYNCHRONOUS, Speculation, asynchronous_cost
from nibble.kernels.cpu.backend import CPUKernels

VOCAB_SIZE = 300
BLOCK_BYTES = 2 * 2 * (2 * 64 * 32 + 2 * 64 * 4)  # two layers, two KV heads of 32
PLENTY = 100 * BLOCK_BYTES
NGRAM = SpeculationMethod.NGRAM


class Output(NamedTuple):
    tokens: list[int]
    logprobs: bytes
    reason: FinishReason | None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=256)
    write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(params=[CPUKernels, LateKernels], ids=["synchronous", "asynchronous"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CPUKernels]:
    backend = request.param(num_threads=2)
    yield backend
    backend.close()


def requests() -> list[GenerationRequest]:
    """A third adjusts nothing, a third has log probabilities at least; some prompts repeat themselves."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(24):
        max_tokens = int(rng.integers(1, 90))
        params: dict[str, Any] = adjustments(rng, VOCAB_SIZE, max_tokens) if i % 3 == 0 else {}
        if i % 3 == 1:
            stop_ids = tuple(range(i, VOCAB_SIZE, 31))
            params = {"logprobs": i % 5, "stop_token_ids": stop_ids, "min_tokens": min(i, max_tokens)}
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=float(rng.choice([0.0, 0.7, 1.3])), seed=i, **params
        )
        part = rng.integers(0, VOCAB_SIZE, rng.integers(1, 50)).tolist()
        prompt = (part * 3)[: int(rng.integers(1, 140))]
        arrival_s = float(rng.integers(1000))
        made.append(
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=arrival_s)
        )
    return made


def run(
    engine: LLMEngine, waiting: list[GenerationRequest], join: Callable[[], bool] = lambda: True
) -> dict[str, Output]:
    """`join` says at each step whether the next request joins."""
    outputs: dict[str, Output] = {}
    waiting = list(waiting)
    while engine.has_unfinished or waiting:
        while waiting and join():
            each = waiting.pop(0)
            outputs[each.request_id] = Output([], b"", None)
            engine.add(each)
        for event in engine.step():
            tokens, logprobs, reason = outputs[event.request_id]
            assert reason is None
            assert event.index == len(tokens)
            logprobs += event.logprobs or b""
            outputs[event.request_id] = Output(tokens + event.token_ids, logprobs, event.finish_reason)
    return outputs


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, Output]:
    backend = CPUKernels(num_threads=2)
    engine = LLMEngine.from_checkpoint(tiny, backend, EngineLimits(PLENTY))
    outputs = {}
    for each in requests():
        outputs |= run(engine, [each])
    backend.close()
    reasons = [output.reason for output in outputs.values()]
    assert {FinishReason.STOP, FinishReason.LENGTH} == set(reasons)
    return outputs


@pytest.fixture(autouse=True)
def step_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late device is a CPU with a tiny model, whose steps are so short that no draft would be worth a wait."""
    monkeypatch.setattr(ModelRunner, "measure_step", lambda runner: 2e-3)


def replay(engine: LLMEngine, outputs: dict[str, Output], accuracy: float, seed: int = 0) -> Speculation:
    tokens = {name: output.tokens for name, output in outputs.items()}
    cost = asynchronous_cost(2e-3) if engine.runner.kernels.is_asynchronous else SYNCHRONOUS
    return Speculation(ReplayDrafter(tokens, accuracy, engine.config.vocab_size, seed), 7, cost)


@pytest.mark.parametrize("accuracy", [0.0, 0.8, 1.0])
def test_drafts_right_or_wrong_change_nothing(
    tiny: Path, kernels: CPUKernels, expected: dict[str, Output], accuracy: float
) -> None:
    """Each request alone, so that it has drafts in all steps where it may."""
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, speculation=NGRAM))
    engine.speculation = replay(engine, expected, accuracy)
    outputs: dict[str, Output] = {}
    for each in requests():
        outputs |= run(engine, [each])
    assert outputs == expected
    stats = engine.stats
    assert stats.num_draft_tokens > 50
    assert (stats.num_accepted_tokens > 0) == (accuracy > 0)
    if accuracy == 1.0:
        assert stats.num_accepted_tokens > stats.num_draft_tokens * 0.9  # but for what comes after a stop token


@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on_drafts_in_any_traffic(
    tiny: Path, kernels: CPUKernels, expected: dict[str, Output], seed: int
) -> None:
    """Requests join at random, find too few blocks, are preempted; those that sample plainly and others in one step."""
    rng = np.random.default_rng(seed)
    limits = EngineLimits(
        kv_cache_bytes=int(rng.integers(6, 9)) * BLOCK_BYTES,
        max_num_sequences=int(rng.integers(1, 12)),
        max_num_batched_tokens=int(rng.integers(12, 200)),
        speculation=NGRAM,
    )
    engine = LLMEngine.from_checkpoint(tiny, kernels, limits)
    assert engine.speculation is not None
    if seed % 2:
        engine.speculation = replay(engine, expected, 0.9, seed)
    assert run(engine, requests(), lambda: rng.random() < 0.1) == expected
    assert engine.stats.num_draft_tokens > 0
    assert engine.stats.num_preemptions > 0 or limits.max_num_sequences < 4


def test_a_request_resumed_anywhere_goes_on_with_the_same_tokens(
    tiny: Path, kernels: CPUKernels, expected: dict[str, Output]
) -> None:
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, speculation=NGRAM))
    engine.speculation = replay(engine, expected, 0.8)
    for each in requests():
        tokens = expected[each.request_id].tokens
        num_done = len(tokens) // 2
        engine.add(each, tokens[:num_done])
        rest: list[int] = []
        while engine.has_unfinished:
            for event in engine.step():
                assert event.index == num_done + len(rest)
                rest += event.token_ids
        assert rest == tokens[num_done:]


def test_what_was_accepted_is_found_by_the_next_turn(tiny: Path, kernels: CPUKernels) -> None:
    """Blocks that drafts helped to fill have the names and the content that one token at a time gives them."""
    sampling = SamplingParams(max_tokens=150, temperature=0.0)
    prompt = [5, 6, 7, 8] * 10
    first = GenerationRequest(request_id="a", prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0)
    outputs = []
    for speculation in (SpeculationMethod.OFF, NGRAM):
        engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, speculation=speculation))
        tokens = run(engine, [first])["a"].tokens
        assert (engine.stats.num_accepted_tokens > 20) == (speculation is NGRAM)
        engine.add(first, tokens[:100])
        rest = engine.step()
        (resumed,) = engine.scheduler.running
        assert resumed.num_shared_blocks == (len(prompt) + 100 - 1) // 64  # all were found
        while engine.has_unfinished:
            rest += engine.step()
        assert [token_id for event in rest for token_id in event.token_ids] == tokens[100:]
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


def test_no_captured_step_is_computed_op_by_op_because_of_drafts(tiny: Path) -> None:
    """Of an asynchronous device: every decode pass with drafts is a replay, of few sizes."""
    backend = LateKernels(num_threads=2)
    engine = LLMEngine.from_checkpoint(tiny, backend, EngineLimits(PLENTY, max_num_sequences=4, speculation=NGRAM))
    num_shapes = len([1, 2, 4]) + len([2, 4, 8, 16, 24, 32, 48, 64, 128])
    num_prompts = len([128, 256])
    # All that samples plain or not; the largest twice, to measure.
    assert backend.num_captured == 2 * (num_shapes + 2) + num_prompts + 1
    tokens = run(engine, [_copying("a"), _copying("b"), _copying("c")])
    backend_steps, stats = backend.num_replayed, engine.stats
    assert stats.num_accepted_tokens > 30
    assert backend_steps >= stats.num_steps - 2  # those of the prompts
    assert {len(output.tokens) for output in tokens.values()} == {80}
    backend.close()


def _copying(name: str) -> GenerationRequest:
    """A greedy random model soon repeats itself."""
    sampling = SamplingParams(max_tokens=80, temperature=0.0)
    prompt = [ord(name), 6, 7] * 4
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0)


GRAMMARS = {
    "array": GrammarSpec(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"enum": ["true", true, 12]}}'),
    "forced": GrammarSpec(
        GrammarKind.JSON_SCHEMA,
        '{"type": "object", "properties": {"a long name": {"const": "and a long value"}, "n": {"type": "integer"}},'
        ' "required": ["a long name", "n"], "additionalProperties": false}',
    ),
    "regex": GrammarSpec(GrammarKind.REGEX, "(abc|abd){3,}e?"),
    "choice": GrammarSpec(GrammarKind.CHOICE, '["yes, of course", "yes, but", "no"]'),
}


def constrained(name: str, **sampling: Any) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"{name}{seed}",
            prompt_token_ids=[3, 4, 5],
            sampling=SamplingParams(max_tokens=60, seed=seed, temperature=1.2, stop_token_ids=(EOS,), **sampling),
            arrival_s=0.0,
            grammar=GRAMMARS[name],
        )
        for seed in range(5)
    ]


@pytest.mark.parametrize("sampling", [{}, {"min_tokens": 12, "logprobs": 2}, {"repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_give_the_same_tokens_and_endings_with_drafts(
    tiny: Path, kernels: CPUKernels, name: str, sampling: dict[str, Any]
) -> None:
    plain = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY))
    wanted = run(plain, constrained(name, **sampling))
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, speculation=NGRAM))
    for accuracy in (1.0, 0.6):
        engine.speculation = replay(engine, wanted, accuracy)
        outputs: dict[str, Output] = {}
        for each in constrained(name, **sampling):
            outputs |= run(engine, [each])
        assert outputs == wanted
        assert (engine.speculation.num_accepted_tokens > 0) == ("repetition_penalty" not in sampling)


def test_what_a_grammar_forces_is_a_draft(tiny: Path, kernels: CPUKernels) -> None:
    """Nothing was there to copy, and a random model says none of it by itself."""
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(PLENTY, speculation=NGRAM))
    run(engine, constrained("forced"))
    assert engine.stats.num_accepted_tokens > 5 * 15
