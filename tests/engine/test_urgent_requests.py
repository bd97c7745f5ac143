"""More urgent requests for a full engine: whose place they get, at what price, and that nobody starves for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_engine import engine_over_simulation, finished_in, finished_in_order, steps_of
from simulated import request

from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import PRIORITY_S, GenerationRequest
from nibble.engine.service_order import Rank, aged_priority

MakeEngine = Callable[..., LLMEngine]
NUM_BLOCKS = 64


@pytest.fixture(params=["synchronous", "asynchronous"])
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return partial(engine_over_simulation, request.param == "asynchronous", num_blocks=NUM_BLOCKS)


class Queue:
    """Requests that the engine does not have yet, and who gets there: as the broker's `exchange`."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.requests: list[GenerationRequest] = []
        self._ranks: dict[str, Rank] = {}

    def submit(self, *requests: GenerationRequest) -> None:
        self._ranks.update({each.request_id: aged_priority(each) for each in requests})
        self.requests = sorted([*self.requests, *requests], key=aged_priority)

    def step(self) -> list[str]:
        """An exchange and a step, as a worker takes them; who ended."""
        num_taken, preemptible = self.engine.capacity, self.engine.preemptible
        assert not (num_taken and preemptible)
        for each, other in zip(self.requests, preemptible, strict=False):
            if aged_priority(each) >= self._ranks[other]:
                break
            num_taken += 1
        taken, self.requests = self.requests[:num_taken], self.requests[num_taken:]
        for each in taken:
            self.engine.add(each)
        return finished_in(self.engine)

    def run(self) -> list[str]:
        """To the end of all; who ended, in order."""
        order: list[str] = []
        while self.requests or self.engine.has_unfinished:
            order += self.step()
        return order


def test_an_urgent_sequence_gets_the_place_of_the_lowest_priority_and_youngest(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_sequences=4)
    for i, priority in enumerate((0, 1, 1, 0)):
        engine.add(request(f"r{i}", max_tokens=40, seed=i, arrival_s=float(i), priority=priority))
    for _ in range(5):
        engine.step()
    engine.add(request("urgent", max_tokens=5, seed=7, arrival_s=9.0))
    engine.step()
    assert steps_of(engine)[-1] == {"r0": 1, "r1": 1, "r3": 1, "urgent": 5}
    assert [sequence.request_id for sequence in engine.scheduler.waiting] == ["r2"]
    order = finished_in_order(engine)
    assert order[0] == "urgent"
    assert order[-1] == "r2"
    assert engine.scheduler.num_preemptions == 1


def test_several_urgent_ones_get_as_many_places(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_sequences=3)
    for i in range(3):
        engine.add(request(f"r{i}", max_tokens=40, seed=i, arrival_s=float(i), priority=1))
    engine.step()
    for i in range(5):
        engine.add(request(f"u{i}", max_tokens=8, seed=9 + i, arrival_s=9.0 + i))
    order = finished_in_order(engine)
    assert order == ["u0", "u1", "u2", "u3", "u4", "r0", "r1", "r2"]
    assert engine.scheduler.num_preemptions == 3


def test_nobody_loses_its_place_to_one_of_the_same_priority(make_engine: MakeEngine) -> None:
    """Nor to an older one that came late, or to one that is served before it by its age alone."""
    engine = make_engine(max_num_sequences=1)
    engine.add(request("running", max_tokens=40, arrival_s=1000.0))
    engine.step()
    engine.add(request("older", max_tokens=5, seed=1, arrival_s=500.0))
    engine.add(request("aged", max_tokens=5, seed=2, priority=1))
    assert finished_in_order(engine) == ["running", "aged", "older"]
    assert engine.scheduler.num_preemptions == 0


def test_nobody_is_preempted_for_blocks_that_others_keep(make_engine: MakeEngine) -> None:
    """All have the same five blocks, and each one or two of its own: what three give back is not enough."""
    engine = make_engine(max_num_sequences=8, num_blocks=13, budget=400)
    prompt = [*range(1, 321)]
    engine.add(request("same", prompt=[*prompt, 900], max_tokens=40, seed=1))
    engine.step()
    for i in range(3):
        engine.add(request(f"lesser{i}", prompt=[*prompt, 901 + i], max_tokens=60, seed=2 + i, priority=1))
    for _ in range(5):
        engine.step()
    assert len(engine.scheduler.running) == 4
    engine.add(request("urgent", num_prompt_tokens=450, max_tokens=5, seed=9, arrival_s=9.0))
    while "same" not in finished_in(engine):
        assert engine.scheduler.num_preemptions == 0
    assert finished_in_order(engine)[0] == "urgent"


def test_nobody_loses_its_place_before_the_urgent_one_can_use_it(make_engine: MakeEngine) -> None:
    """A prompt that is served before both has all of the budget but for what decodes."""
    engine = make_engine(max_num_sequences=2, budget=32)
    engine.add(request("lesser", max_tokens=60, seed=1, priority=1))
    engine.step()
    engine.add(request("prompt", num_prompt_tokens=1000, max_tokens=40, seed=2, priority=-1))
    engine.step()
    engine.add(request("urgent", max_tokens=5, seed=3, arrival_s=9.0))
    finished_in_order(engine)
    steps = steps_of(engine)
    started = next(i for i, step in enumerate(steps) if "urgent" in step)
    assert started >= 1000 // 32
    assert all(step["lesser"] == 1 for step in steps[1:started])
    assert engine.scheduler.num_preemptions == 1


@pytest.mark.parametrize(("max_num_sequences", "num_blocks"), [(3, NUM_BLOCKS), (8, 8)])
def test_a_full_engine_asks_for_one_more_urgent_request_at_a_time(
    make_engine: MakeEngine, max_num_sequences: int, num_blocks: int
) -> None:
    """Be it full because of the places in its batch or because of blocks."""
    engine = make_engine(max_num_sequences=max_num_sequences, num_blocks=num_blocks)
    queue = Queue(engine)
    assert (engine.capacity > 0, engine.preemptible) == (True, [])
    queue.submit(*(request(f"r{i}", num_prompt_tokens=150, max_tokens=80, seed=i, priority=1) for i in range(6)))
    finished: list[str] = []
    for _ in range(20):
        finished += queue.step()
    assert engine.capacity == 0
    queue.submit(
        *(request(f"u{i}", num_prompt_tokens=100, max_tokens=5, seed=9 + i, arrival_s=9.0 + i) for i in range(3))
    )
    while queue.requests or engine.has_unfinished:
        finished += queue.step()
        assert sum(sequence.request_id[0] == "u" for sequence in engine.scheduler.waiting) <= 1
    assert len(finished) == 9
    assert finished[:3] == ["u0", "u1", "u2"]
    assert 0 < engine.scheduler.num_preemptions <= 3


@pytest.mark.parametrize("max_num_sequences", [1, 2, 4])
def test_who_lost_its_place_does_not_get_it_back_while_more_urgent_ones_are_queued(
    make_engine: MakeEngine, max_num_sequences: int
) -> None:
    """It would lose it again in the next step, and what it computes anew each time would be in vain."""
    engine = make_engine(max_num_sequences=max_num_sequences)
    queue = Queue(engine)
    lesser = [request(f"r{i}", max_tokens=50, seed=i, priority=2) for i in range(max_num_sequences)]
    queue.submit(*lesser)
    for _ in range(5):
        queue.step()
    queue.submit(*(request(f"u{i}", max_tokens=3 + i % 4, seed=50 + i, arrival_s=1.0 + i) for i in range(20)))
    order = queue.run()
    assert sorted(order[:20]) == sorted(f"u{i}" for i in range(20))
    assert engine.scheduler.num_preemptions == max_num_sequences
    assert len(engine.scheduler.running) == 0


def test_an_engine_holds_at_most_as_many_waiting_requests_as_it_can_run(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_sequences=2)
    queue = Queue(engine)
    for level in range(9):
        arrival_s = float(level)
        queue.submit(*(request(f"{level}-{i}", seed=level, arrival_s=arrival_s, priority=-level) for i in range(2)))
        for _ in range(3):
            queue.step()
            assert len(engine.scheduler.waiting) <= 2
    assert queue.requests
    assert len(queue.run()) > 0
    assert not engine.has_unfinished


@pytest.mark.parametrize("is_asynchronous", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    urgent=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=5),
    victim=st.tuples(st.integers(1, 300), st.integers(1, 60)),
    num_blocks=st.integers(6, 16),
    max_num_sequences=st.integers(1, 6),
    budget=st.integers(6, 100),
    num_priorities=st.integers(0, 3),
)
def test_nobody_starves_behind_a_queue_of_urgent_requests(
    is_asynchronous: bool,
    urgent: list[tuple[int, int]],
    victim: tuple[int, int],
    num_blocks: int,
    max_num_sequences: int,
    budget: int,
    num_priorities: int,
) -> None:
    """Nobody takes its place any more once the time that the priorities are worth is over."""
    step_s, num_queued, num_requests, now_s = 2.0, 20, 0, 0.0
    engine = engine_over_simulation(is_asynchronous, num_blocks, max_num_sequences, budget)
    queue = Queue(engine)
    prompt, max_tokens = victim
    queue.submit(request("victim", num_prompt_tokens=prompt, max_tokens=max_tokens, seed=999, priority=num_priorities))
    longest = max(num_prompt // budget + 2 + max_tokens for num_prompt, max_tokens in urgent)
    num_ahead = num_queued + 2 * max_num_sequences
    bound = num_priorities * PRIORITY_S / step_s + 2 * longest * num_ahead + 2 * (prompt // budget + 2 + max_tokens)
    for _ in range(int(bound)):
        while len(queue.requests) < num_queued:
            num_prompt, max_tokens = urgent[num_requests % len(urgent)]
            num_requests += 1
            name, seed = f"urgent-{num_requests}", num_requests % 500
            queue.submit(request(name, num_prompt_tokens=num_prompt, max_tokens=max_tokens, seed=seed, arrival_s=now_s))
        now_s += step_s
        if "victim" in queue.step():
            return
    raise AssertionError(f"not served within {bound} steps")
