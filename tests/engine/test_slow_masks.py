"""A grammar whose masks take long: who waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from late_kernels import LateKernels
from llguidance import LLExecutor
from tiny_models import make_tiny_llama
from tiny_tokenizer import EOS, write_tiny_tokenizer

from nibble.engine import grammar
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, GrammarKind, GrammarSpec, SamplingParams
from nibble.kernels.cpu.backend import CPUKernels

SLOW = GrammarSpec(GrammarKind.REGEX, "[a-z]*")
QUICK = GrammarSpec(GrammarKind.REGEX, "[0-9]*")


class SlowExecutor:
    """Its masks of some sequences take mask_s longer, or until the gate is open."""

    def __init__(self, engine: LLMEngine) -> None:
        assert engine.constraints is not None
        self._constraints, self._executor = engine.constraints, LLExecutor(2)
        self.mask_s = 0.0
        self.gate = threading.Event()
        self.gate.set()

    def unsafe_compute_mask_ptr(self, rows: list[tuple[Any, int]], *target: int) -> None:
        self._executor.unsafe_compute_mask_ptr(rows, *target)
        slow = [each.matcher for seq, each in [*self._constraints._constraints.items()] if each and is_slow(seq)]
        if any(matcher is other for matcher, _ in rows for other in slow):
            time.sleep(self.mask_s)
            assert self.gate.wait(30)

    def consume_token_par(self, pairs: list[tuple[Any, int]]) -> None:
        self._executor.consume_token_par(pairs)


def is_slow(sequence: Any) -> bool:
    return bool(sequence.request.grammar == SLOW)


@pytest.fixture(params=[CPUKernels, LateKernels], ids=["synchronous", "asynchronous"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LLMEngine]:
    make_tiny_llama(tmp_path, vocab_size=300, max_context_tokens=512)
    write_tiny_tokenizer(tmp_path)
    kernels = request.param(num_threads=1)
    yield LLMEngine.from_checkpoint(tmp_path, kernels, EngineLimits(8 << 20, max_num_sequences=16))
    kernels.close()


@pytest.fixture
def executor(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> SlowExecutor:
    slow = SlowExecutor(engine)
    assert engine.constraints is not None
    monkeypatch.setitem(vars(engine.constraints), "_executor", slow)
    return slow


def add(engine: LLMEngine, request_id: str, spec: GrammarSpec | None, max_tokens: int = 400) -> None:
    engine.add(
        GenerationRequest(
            request_id=request_id,
            prompt_token_ids=[5, 6, 7, 8],
            sampling=SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, stop_token_ids=(EOS,)),
            arrival_s=0.0,
            grammar=spec,
        )
    )


def step_until(engine: LLMEngine, request_id: str, count: int) -> dict[str, int]:
    """How many tokens everybody got until this one had so many more."""
    counts: dict[str, int] = {}
    while counts.get(request_id, 0) < count:
        for event in engine.step():
            assert event.error is None
            counts[event.request_id] = counts.get(event.request_id, 0) + len(event.token_ids)
    return counts


def test_a_sequence_with_slow_masks_soon_misses_steps_alone(engine: LLMEngine, executor: SlowExecutor) -> None:
    add(engine, "slow", SLOW)
    quick = [f"quick{i}" for i in range(12)]
    for name in quick:
        add(engine, name, QUICK)
    step_until(engine, "slow", 5)
    executor.mask_s = 0.1
    step_until(engine, "slow", 4)  # in the first of these steps everybody waits, in the second those of the same call
    executor.mask_s = 0.3
    counts = step_until(engine, quick[0], 10)
    assert min(counts[name] for name in quick) >= 6
    assert counts.get("slow", 0) <= 5


def test_those_whose_masks_are_quick_again_take_part_in_every_step(engine: LLMEngine, executor: SlowExecutor) -> None:
    for name, spec in (("slow", SLOW), ("quick", QUICK)):
        add(engine, name, spec)
    executor.mask_s = 0.02
    step_until(engine, "slow", 4)
    executor.mask_s = 0.0
    step_until(engine, "slow", 4)
    counts = step_until(engine, "quick", 20)
    assert counts["slow"] >= 10


def test_a_step_waits_once_for_a_mask(
    engine: LLMEngine, executor: SlowExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "PATIENCE_S", 1.0)
    add(engine, "slow", SLOW)
    add(engine, "free", None)
    step_until(engine, "slow", 2)
    executor.gate.clear()
    started_s = time.monotonic()
    counts = step_until(engine, "free", 10)
    assert time.monotonic() - started_s < 5.0
    assert counts.get("slow", 0) <= 1
    executor.gate.set()
    step_until(engine, "slow", 2)
