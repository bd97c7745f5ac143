"""Whole batches over the simulated model."""

from __future__ import annotations

import pytest
from simulated import CONFIG, SimulatedRunner, request, token_at

from nibble.engine.errors import EngineError, RequestError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.offline import generate
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def engine(request: pytest.FixtureRequest) -> LLMEngine:
    limits = EngineLimits(0, max_num_sequences=4, max_num_batched_tokens=64)
    return LLMEngine(SimulatedRunner(12, 64, request.param), CONFIG, limits)


def requests(count: int) -> list[GenerationRequest]:
    """Of different lengths, so that they end in another order."""
    return [
        request(f"r{i}", num_prompt_tokens=3 + 40 * (i % 4), max_tokens=1 + i * 7 % 11, seed=i) for i in range(count)
    ]


def test_more_requests_than_the_engine_holds_come_back_in_order(engine: LLMEngine) -> None:
    most_at_once = 0

    def watch(index: int, event: TokenEvent) -> bool:
        nonlocal most_at_once
        most_at_once = max(most_at_once, len(engine.scheduler.running) + len(engine.scheduler.waiting))
        assert event.request_id == f"r{index}"
        return False

    completions = generate(engine, requests(50), watch)
    assert [done.token_ids for done in completions] == [
        [token_at(i, k) for k in range(1 + i * 7 % 11)] for i in range(50)
    ]
    assert {done.finish_reason for done in completions} == {FinishReason.LENGTH}
    assert all(done.metrics and done.metrics.generated_tokens == len(done.token_ids) for done in completions)
    assert most_at_once <= 4


def test_nothing_is_computed_if_one_of_them_can_never_run(engine: LLMEngine) -> None:
    with pytest.raises(RequestError, match="prompt has 5000 tokens, the limit is 767"):
        generate(engine, [*requests(3), request("long", num_prompt_tokens=5000)])
    assert engine.stats.num_steps == 0
    assert not engine.has_unfinished


def test_a_request_whose_logits_are_not_finite_fails_alone(engine: LLMEngine) -> None:
    assert isinstance(engine.runner, SimulatedRunner)
    engine.runner.nonfinite.add("r2")
    completions = generate(engine, requests(6))
    assert [done.finish_reason is FinishReason.ERROR for done in completions] == [i == 2 for i in range(6)]
    assert "logits were not finite" in (completions[2].error or "")
    assert completions[3].token_ids == [token_at(3, k) for k in range(1 + 21 % 11)]


def test_a_request_can_be_ended_early(engine: LLMEngine) -> None:
    batch = [request(f"r{i}", max_tokens=30, seed=i) for i in range(6)]
    completions = generate(engine, batch, lambda index, event: index == 1 and event.index == 4)
    assert [len(done.token_ids) for done in completions] == [30, 5, 30, 30, 30, 30]
    assert completions[1].finish_reason is FinishReason.STOP
    assert not engine.has_unfinished


def test_the_engine_is_idle_after_an_error_and_serves_the_next_batch(engine: LLMEngine) -> None:
    def fail(index: int, event: TokenEvent) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(engine, requests(9), fail)
    assert not engine.has_unfinished
    assert generate(engine, []) == []
    assert generate(engine, requests(3))[1].token_ids == [token_at(1, k) for k in range(8)]
    engine.scheduler.block_manager.check_integrity([])


def test_an_engine_in_use_is_refused(engine: LLMEngine) -> None:
    engine.add(request("other"))
    with pytest.raises(EngineError, match="in use"):
        generate(engine, requests(1))
