"""An engine over a simulated model (simulated.py) that keeps what each step computed, and how it is run to its end."""

from __future__ import annotations

from simulated import CONFIG, RecordingRunner

from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.service_order import ServiceOrder, aged_priority


def engine_over_simulation(
    is_asynchronous: bool,
    num_blocks: int = 32,
    max_num_sequences: int = 8,
    budget: int = 64,
    order: ServiceOrder = aged_priority,
) -> LLMEngine:
    limits = EngineLimits(0, max_num_sequences, budget)
    runner = RecordingRunner(num_blocks, budget, is_asynchronous)
    return LLMEngine(runner, CONFIG, limits, lambda: 100.0, order)


def steps_of(engine: LLMEngine) -> list[dict[str, int]]:
    assert isinstance(engine.runner, RecordingRunner)
    return engine.runner.steps


def finished_in(engine: LLMEngine) -> list[str]:
    """Who ends in the next step."""
    return [event.request_id for event in engine.step() if event.finish_reason]


def finished_in_order(engine: LLMEngine) -> list[str]:
    order = []
    while engine.has_unfinished:
        order += finished_in(engine)
    return order
