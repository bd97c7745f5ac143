"""What preempted sequences had computed is moved to the host's memory and back, and nothing is computed twice for it.

The simulated runner refuses a context whose content is not what the sequence itself would have computed; the random
operations of `test_prefix_cache.py` go through a swap space too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from simulated import CONFIG, SimulatedRunner, request, token_at

from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest
from nibble.engine.sequence import Sequence
from nibble.engine.swap_space import SwapSpace

NUM_BLOCKS, BUDGET = 8, 512


def make_engine(is_asynchronous: bool, num_swap_blocks: int, has_prefix_cache: bool = False) -> LLMEngine:
    limits = EngineLimits(0, 4, BUDGET, has_prefix_cache=has_prefix_cache)
    runner = SimulatedRunner(NUM_BLOCKS, BUDGET, is_asynchronous, num_swap_blocks)
    return LLMEngine(runner, CONFIG, limits, lambda: 100.0)


@pytest.fixture(params=["synchronous", "asynchronous"])
def is_asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "asynchronous")


def requests(count: int = 3) -> list[GenerationRequest]:
    """Two of them fit, until they have grown."""
    return [request(str(i), num_prompt_tokens=130, max_tokens=200, seed=i, arrival_s=float(i)) for i in range(count)]


def steps(engine: LLMEngine) -> Iterator[dict[str, list[int]]]:
    """Step to the end; after each step the tokens so far."""
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
        scheduler = engine.scheduler
        scheduler.block_manager.check_integrity([s.block_table for s in [*scheduler.running, *scheduler.waiting]])
        scheduler.swap_space.check_integrity(scheduler.waiting)
        yield tokens


def run(engine: LLMEngine, added: list[GenerationRequest]) -> None:
    """All get their own tokens. The statistics are those of the scheduler's parts before, in between and after."""
    for each in added:
        engine.add(each)
    assert engine.stats.num_free_blocks == engine.stats.num_blocks > 0
    most_swapped = 0
    for tokens in steps(engine):  # noqa: B007 - the last ones are all of them
        stats, blocks, swap = engine.stats, engine.scheduler.block_manager, engine.scheduler.swap_space
        assert (stats.num_free_blocks, stats.num_cached_blocks) == (blocks.num_free, blocks.num_cached)
        assert (stats.num_used_swap_blocks, stats.num_swapped_in) == (swap.num_used, swap.num_restored)
        most_swapped = max(most_swapped, swap.num_used)
    assert engine.stats.num_swapped_out >= engine.stats.num_swapped_in
    assert bool(most_swapped) == bool(engine.stats.num_swapped_out)
    assert engine.stats.wait_s > 0
    assert tokens == {each.request_id: [token_at(each.sampling.seed, i) for i in range(200)] for each in added}


def test_nothing_is_computed_again(is_asynchronous: bool) -> None:
    engine = make_engine(is_asynchronous, num_swap_blocks=16)
    run(engine, requests())
    assert engine.stats.num_preemptions > 0
    assert engine.scheduler.swap_space.num_restored == engine.stats.num_preemptions
    assert engine.stats.num_prompt_tokens == 3 * 130
    assert engine.stats.num_generated_tokens == 3 * 200


def test_without_room_prompts_are_computed_again(is_asynchronous: bool) -> None:
    engine = make_engine(is_asynchronous, num_swap_blocks=2)
    run(engine, requests())
    assert engine.stats.num_preemptions > 0
    assert engine.scheduler.swap_space.num_restored == 0
    assert engine.stats.num_prompt_tokens == (3 + engine.stats.num_preemptions) * 130


def test_an_aborted_sequence_leaves_its_room_to_others(is_asynchronous: bool) -> None:
    engine = make_engine(is_asynchronous, num_swap_blocks=5)
    for each in requests():
        engine.add(each)
    for _ in steps(engine):
        if engine.scheduler.num_preemptions == 1:
            break
    (preempted,) = [s for s in engine.scheduler.waiting if s.num_tokens > 130]
    engine.abort(preempted.request_id)
    for _ in steps(engine):
        pass
    run(engine, requests())
    assert engine.scheduler.swap_space.num_restored == engine.scheduler.num_preemptions - 1


def test_a_prefix_that_others_still_use_is_found_and_not_kept_twice(is_asynchronous: bool) -> None:
    engine = make_engine(is_asynchronous, num_swap_blocks=2, has_prefix_cache=True)
    prefix = [7] * 192
    for i in range(2):
        engine.add(request(str(i), prompt=[*prefix, i + 1], max_tokens=250, seed=i, arrival_s=float(i)))
    for _ in steps(engine):
        pass
    assert engine.scheduler.num_preemptions == 1  # 3 blocks together and 3 or 4 of each; what is kept fits into 2
    assert engine.scheduler.swap_space.num_restored == 1
    assert engine.stats.num_prompt_tokens == 193 + 1


def test_what_was_kept_is_dropped_if_the_blocks_before_it_are_gone(is_asynchronous: bool) -> None:
    engine = make_engine(is_asynchronous, num_swap_blocks=8, has_prefix_cache=True)
    prefix = [7] * 192
    for i in range(2):
        engine.add(request(str(i), prompt=[*prefix, i + 1], max_tokens=250, seed=i, arrival_s=float(i)))
    for _ in steps(engine):
        if engine.scheduler.num_preemptions == 1:
            break
    engine.abort("0")
    engine.add(request("all", num_prompt_tokens=500, max_tokens=2, seed=5, priority=-1))
    *_, tokens = steps(engine)
    assert tokens["1"][-1] == token_at(1, 249)
    assert engine.scheduler.swap_space.num_restored == 0
    assert engine.stats.num_prompt_tokens == 193 + 1 + 500 + 193


def test_a_move_that_is_still_to_come_is_dropped_with_what_it_was_for() -> None:
    """Else two blocks would be on their way to one place, in no order."""
    space = SwapSpace(3)
    first, second = (Sequence.start(each, (), 1000, 0.0) for each in requests(2))
    for sequence, blocks in ((first, [4, 5]), (second, [6, 7, 8])):
        sequence.block_table += blocks
        sequence.num_computed_tokens = len(blocks) * 64
    space.save(first, 0)
    space.discard(first)
    space.save(second, 0)
    moves = space.take_moves()
    assert [move.block_id for move in moves] == [6, 7, 8]
    assert {move.host_block for move in moves} == {0, 1, 2}
    space.check_integrity([second])
