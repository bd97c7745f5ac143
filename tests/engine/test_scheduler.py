"""Who is served when, over a simulated model: priorities, preemption, the budget of a step, and that nobody starves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_engine import engine_over_simulation, finished_in_order, steps_of
from simulated import request, token_at

from nibble.engine.errors import RequestError
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import PRIORITY_S, GenerationRequest
from nibble.engine.service_order import Rank, aged_priority

MakeEngine = Callable[..., LLMEngine]


@pytest.fixture(params=["synchronous", "asynchronous"])
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return partial(engine_over_simulation, request.param == "asynchronous")


def num_steps_until_token(engine: LLMEngine, request_id: str, max_steps: int = 2000) -> int:
    for num_steps in range(1, max_steps):
        if any(event.request_id == request_id for event in engine.step()):
            return num_steps
    raise AssertionError(f"{request_id} starved")


def test_decode_comes_first_and_prompts_share_what_is_left(make_engine: MakeEngine) -> None:
    engine = make_engine(budget=20)
    for i in range(3):
        engine.add(request(f"d{i}", num_prompt_tokens=4, max_tokens=50, seed=i))
    engine.step()
    engine.add(request("long", num_prompt_tokens=40, seed=5, arrival_s=1.0))
    engine.add(request("short", num_prompt_tokens=5, seed=6, arrival_s=2.0))
    for _ in range(3):
        engine.step()
    decodes = {"d0": 1, "d1": 1, "d2": 1}
    assert steps_of(engine)[1:] == [
        {**decodes, "long": 17},
        {**decodes, "long": 17},
        {**decodes, "long": 6, "short": 5},
    ]


def test_an_urgent_prompt_overtakes_a_long_one_that_is_begun(make_engine: MakeEngine) -> None:
    engine = make_engine(budget=32)
    engine.add(request("long", num_prompt_tokens=1000, seed=1))
    engine.step()
    engine.add(request("urgent", num_prompt_tokens=50, seed=2, arrival_s=1.0, priority=-1))
    assert num_steps_until_token(engine, "urgent") <= 3
    assert sorted(finished_in_order(engine)) == ["long", "urgent"]


def test_tokens_computed_anew_leave_every_decoding_sequence_its_token(make_engine: MakeEngine) -> None:
    """A resumed request's generated tokens share the budget by rank, as prompts do."""
    engine = make_engine(budget=10)
    engine.add(request("d", num_prompt_tokens=4, max_tokens=60, seed=1, arrival_s=5.0))
    engine.step()
    engine.add(request("resumed", num_prompt_tokens=4, max_tokens=60, seed=2), [token_at(2, i) for i in range(40)])
    engine.add(request("new", num_prompt_tokens=4, max_tokens=2, seed=3, arrival_s=9.0))
    finished_in_order(engine)
    steps = steps_of(engine)[1:]
    assert all(step["d"] == 1 for step in steps[:59])
    # 4 of the prompt, then or together with them 40 generated ones, 9 in each step but that in which `new` has a token
    is_apart = engine.runner.kernels.num_prefill_tokens(4) == 4
    assert [step["resumed"] for step in steps[:7]] == ([4, 8, 9, 9, 9, 5, 1] if is_apart else [9, 9, 9, 9, 8, 1, 1])


def test_a_waiting_sequence_takes_the_blocks_of_the_lowest_priority_and_youngest(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    for i, priority in enumerate((0, 1, 1)):
        engine.add(
            request(f"r{i}", num_prompt_tokens=100, max_tokens=80, seed=i, arrival_s=float(i), priority=priority)
        )
    for _ in range(10):
        engine.step()
    assert len(engine.scheduler.running) == 3
    engine.add(request("urgent", num_prompt_tokens=150, max_tokens=5, seed=7, arrival_s=9.0))
    assert num_steps_until_token(engine, "urgent") <= 5
    assert [sequence.request_id for sequence in engine.scheduler.waiting] == ["r2"]
    assert engine.scheduler.num_preemptions == 1
    assert finished_in_order(engine)[0] == "urgent"


def test_nobody_is_preempted_for_one_of_the_same_priority_that_waits(make_engine: MakeEngine) -> None:
    """Nor for an older one that came late, as from another worker."""
    engine = make_engine(num_blocks=4)
    engine.add(request("running", num_prompt_tokens=100, max_tokens=80, arrival_s=5.0))
    engine.step()
    engine.add(request("older", num_prompt_tokens=150, max_tokens=5, seed=7, arrival_s=1.0))
    assert finished_in_order(engine) == ["running", "older"]
    assert engine.scheduler.num_preemptions == 0


def test_nobody_is_preempted_in_vain(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add(request("same", num_prompt_tokens=300, max_tokens=10, seed=1))
    engine.add(request("lesser", num_prompt_tokens=100, max_tokens=30, seed=2, priority=1))
    for _ in range(8):
        engine.step()
    engine.add(request("urgent", num_prompt_tokens=400, max_tokens=5, seed=3, arrival_s=9.0))
    while not any(event.request_id == "same" and event.finish_reason for event in engine.step()):
        assert engine.scheduler.num_preemptions == 0
    assert finished_in_order(engine) == ["urgent", "lesser"]


def test_an_urgent_one_that_waits_for_a_prefix_preempts_nobody(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=12)
    engine.add(request("lesser", num_prompt_tokens=300, max_tokens=20, seed=1, priority=1))  # five blocks
    for _ in range(6):
        engine.step()
    prompt = [*range(1, 260)]
    engine.add(request("first", prompt=prompt, max_tokens=20, seed=2, arrival_s=1.0))  # five more
    engine.add(request("second", prompt=prompt, max_tokens=5, seed=3, arrival_s=2.0))  # one, when it finds the others
    finished_in_order(engine)
    assert engine.scheduler.num_preemptions == 0


def test_the_first_that_does_not_fit_is_not_overtaken_by_smaller_ones(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=8)
    engine.add(request("running", num_prompt_tokens=200, max_tokens=50, seed=1))
    engine.step()
    engine.add(request("big", num_prompt_tokens=400, max_tokens=5, seed=2, arrival_s=1.0))
    for i in range(20):
        engine.add(request(f"s{i}", num_prompt_tokens=10, max_tokens=5, seed=i, arrival_s=2.0 + i))
    order = finished_in_order(engine)
    assert order[:2] == ["running", "big"]


def test_an_order_of_ones_own_decides_instead(make_engine: MakeEngine) -> None:
    """Each request costs its tenant one unit of virtual time; the tenant with the least goes first."""
    virtual_time: dict[str, float] = {}

    def fair(each: GenerationRequest) -> Rank:
        virtual_time[each.tenant] = virtual_time.get(each.tenant, 0.0) + 1.0
        return (virtual_time[each.tenant], each.request_id)

    def of(tenant: str, name: str) -> GenerationRequest:
        each = request(name)
        return GenerationRequest(
            request_id=name,
            prompt_token_ids=each.prompt_token_ids,
            sampling=each.sampling,
            arrival_s=0.0,
            tenant=tenant,
        )

    engine = make_engine(max_num_sequences=1, order=fair)
    for i in range(4):
        engine.add(of("greedy", f"g{i}"))
    engine.add(of("modest", "m0"))
    assert finished_in_order(engine) == ["g0", "m0", "g1", "g2", "g3"]


def test_a_preempted_sequence_keeps_its_rank(make_engine: MakeEngine) -> None:
    asked: list[str] = []

    def order(each: GenerationRequest) -> Rank:
        asked.append(each.request_id)
        return aged_priority(each)

    engine = make_engine(num_blocks=4, order=order)
    for i in range(3):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=100, seed=i, arrival_s=float(i)))
    assert finished_in_order(engine) == ["r0", "r1", "r2"]
    assert engine.scheduler.num_preemptions > 0
    assert asked == ["r0", "r1", "r2"]


def test_a_preempted_sequence_is_served_before_younger_ones(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=3)
    for i in range(3):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=100, seed=i, arrival_s=float(i)))
    engine.step()
    for i in range(3, 6):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=5, seed=i, arrival_s=float(i)))
    while engine.scheduler.num_preemptions == 0:
        engine.step()
    assert [sequence.request_id for sequence in engine.scheduler.waiting] == ["r2", "r3", "r4", "r5"]


def test_a_request_that_outgrew_a_smaller_worker_is_refused(make_engine: MakeEngine) -> None:
    """It would be preempted for itself for ever."""
    engine = make_engine(num_blocks=2)
    engine.add(request("fits", num_prompt_tokens=100, max_tokens=60, seed=1), [token_at(1, i) for i in range(27)])
    assert finished_in_order(engine) == ["fits"]
    message = "prompt and 28 generated tokens are 128 tokens, the limit is 127"
    with pytest.raises(RequestError, match=message):
        engine.add(request("grown", num_prompt_tokens=100, max_tokens=60), [1] * 28)


@dataclass
class Flood:
    """A clock that moves by step_s with each step, and more urgent requests than the engine can serve, for ever."""

    engine: LLMEngine
    urgent: Iterable[tuple[int, int]]  # prompt and generated tokens of each, round and round
    num_per_step: int
    step_s: float
    now_s: float = 0.0
    num_requests: int = 0
    shapes: list[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = list(self.urgent)

    def step(self, priority: int) -> list[str]:
        """Who ended."""
        for _ in range(self.num_per_step):
            if len(self.engine.scheduler.waiting) > 50:  # what admission allows
                break
            num_prompt_tokens, max_tokens = self.shapes[self.num_requests % len(self.shapes)]
            self.num_requests += 1
            self.engine.add(
                request(
                    f"urgent-{self.num_requests}",
                    num_prompt_tokens=num_prompt_tokens,
                    max_tokens=max_tokens,
                    seed=self.num_requests % 500,
                    priority=priority,
                    arrival_s=self.now_s,
                )
            )
        self.now_s += self.step_s
        return [event.request_id for event in self.engine.step() if event.finish_reason]


@pytest.mark.parametrize("is_asynchronous", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    urgent=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 40)), min_size=1, max_size=5),
    victim=st.tuples(st.integers(1, 300), st.integers(1, 60)),
    num_blocks=st.integers(6, 16),
    max_num_sequences=st.integers(1, 6),
    budget=st.integers(6, 100),
    num_priorities=st.integers(0, 3),
    step_s=st.sampled_from([1.0, 5.0]),
)
def test_nobody_starves_under_a_flood_of_urgent_requests(
    is_asynchronous: bool,
    urgent: list[tuple[int, int]],
    victim: tuple[int, int],
    num_blocks: int,
    max_num_sequences: int,
    budget: int,
    num_priorities: int,
    step_s: float,
) -> None:
    """The wait is bounded: by the time that the priorities are worth, and then by the work that is ahead of it."""
    engine = engine_over_simulation(is_asynchronous, num_blocks, max_num_sequences, budget)
    flood = Flood(engine, urgent, num_per_step=3, step_s=step_s)
    for _ in range(20):
        flood.step(priority=0)
    engine.add(
        request(
            "victim",
            num_prompt_tokens=victim[0],
            max_tokens=victim[1],
            seed=999,
            priority=num_priorities,
            arrival_s=flood.now_s,
        )
    )
    # Those with a better rank at the end: what came within the priorities' time and what waited or ran before, one
    # after the other in the worst case, each computed a second time for a preemption.
    longest = max(num_prompt // budget + 2 + max_tokens for num_prompt, max_tokens in urgent)
    num_ahead = 51 + max_num_sequences
    overtaking_steps = int(num_priorities * PRIORITY_S / step_s)
    bound = overtaking_steps + 2 * longest * num_ahead + 2 * (victim[0] // budget + 2 + victim[1])
    for _ in range(bound):
        if "victim" in flood.step(priority=0):
            return
    raise AssertionError(f"not served within {bound} steps")
