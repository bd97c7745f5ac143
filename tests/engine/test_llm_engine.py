"""LLMEngine and Scheduler over a simulated model: who runs when, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import CONFIG, SimulatedRunner, request, token_at

from nibble.engine.errors import RequestError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


MakeEngine = Callable[..., LLMEngine]


@pytest.fixture(params=["synchronous", "asynchronous"])
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return partial(engine_over_simulation, request.param == "asynchronous")


def engine_over_simulation(
    is_asynchronous: bool,
    num_blocks: int = 32,
    max_num_sequences: int = 8,
    max_num_batched_tokens: int = 64,
    clock: Clock | None = None,
) -> LLMEngine:
    limits = EngineLimits(0, max_num_sequences, max_num_batched_tokens)
    runner = SimulatedRunner(num_blocks, max_num_batched_tokens, is_asynchronous)
    return LLMEngine(runner, CONFIG, limits, clock or Clock())


def check_integrity(engine: LLMEngine) -> None:
    scheduler = engine.scheduler
    scheduler.block_manager.check_integrity([s.block_table for s in [*scheduler.running, *scheduler.waiting]])


def run(engine: LLMEngine, max_steps: int = 5000) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            break
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
        check_integrity(engine)
    assert not engine.has_unfinished
    assert engine.scheduler.block_manager.num_free == engine.scheduler.block_manager.num_blocks
    return events


def tokens_of(events: list[TokenEvent], start: int = 0) -> list[int]:
    """The generated tokens, after checking that indexes have no gap and that exactly the last event is final."""
    token_ids: list[int] = []
    for event in events:
        assert event.index == start + len(token_ids)
        token_ids += event.token_ids
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    return token_ids


def expected(seed: int, start: int, stop: int) -> list[int]:
    return [token_at(seed, i) for i in range(start, stop)]


def test_a_request_gets_max_tokens_tokens_and_one_final_event(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", max_tokens=10, seed=3))
    events = run(engine)["a"]
    assert tokens_of(events) == expected(3, 0, 10)
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert events[-1].metrics is not None
    assert events[-1].metrics.generated_tokens == 10


def test_a_stop_token_ends_the_request_and_is_its_last_token(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", seed=3, stop_token_ids=(token_at(3, 4),)))
    events = run(engine)["a"]
    assert tokens_of(events) == expected(3, 0, 5)
    assert events[-1].finish_reason is FinishReason.STOP


def test_a_stop_token_before_min_tokens_does_not_end_the_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", seed=3, max_tokens=8, min_tokens=5, stop_token_ids=(token_at(3, 4),)))
    assert tokens_of(run(engine)["a"]) == expected(3, 0, 8)


def test_generation_ends_where_the_context_ends(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=2)
    engine.add(request("a", num_prompt_tokens=100, max_tokens=1000, seed=1))
    events = run(engine)["a"]
    assert len(tokens_of(events)) == 28
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_a_resumed_request_goes_on_at_its_index(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    engine.add(request("a", num_prompt_tokens=40, max_tokens=90, seed=5), expected(5, 0, 70))
    assert tokens_of(run(engine)["a"], start=70) == expected(5, 70, 90)


def test_sequences_join_and_leave_at_any_step(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", max_tokens=20, seed=1))
    events: list[TokenEvent] = []
    for _ in range(5):
        events += engine.step()
    engine.add(request("b", max_tokens=3, seed=2, arrival_s=1.0))
    both = run(engine)
    assert tokens_of([*events, *both["a"]]) == expected(1, 0, 20)
    assert tokens_of(both["b"]) == expected(2, 0, 3)


def test_decoding_sequences_get_a_token_in_every_step_while_a_long_prompt_is_prefilled(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    engine.add(request("decoding", max_tokens=100, seed=1))
    engine.step()
    engine.add(request("long", num_prompt_tokens=300, max_tokens=2, seed=2, arrival_s=1.0))
    num_steps = 0
    while True:
        events = {event.request_id for event in engine.step()}
        assert "decoding" in events
        num_steps += 1
        if "long" in events:
            break
    # 300 prompt tokens, 15 a step beside the decoding one, or 256 and the rest; events may come one step late
    kernels = engine.runner.kernels
    assert num_steps == (20 if kernels.num_prefill_tokens(300) == 300 else 18 + 3) + kernels.is_asynchronous


def test_a_preempted_sequence_keeps_its_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    for i in range(3):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=100, seed=i, arrival_s=float(i)))
    events = run(engine)
    assert engine.stats.num_preemptions > 0
    for i in range(3):
        assert tokens_of(events[f"r{i}"]) == expected(i, 0, 100)


def test_the_oldest_is_never_preempted(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=4)
    for i in (2, 0, 1):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=100, seed=i, arrival_s=float(i)))
    finished = [request_id for request_id, events in run(engine).items() if events[-1].finish_reason]
    engine = make_engine(num_blocks=4)
    for i in (2, 0, 1):
        engine.add(request(f"r{i}", num_prompt_tokens=50, max_tokens=100, seed=i, arrival_s=float(i)))
    order: list[str] = []
    while engine.has_unfinished:
        order += [event.request_id for event in engine.step() if event.finish_reason]
    assert order[0] == "r0"
    assert sorted(order) == sorted(finished)


def test_a_higher_priority_is_served_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_sequences=1)
    engine.add(request("late-but-urgent", priority=-1, arrival_s=9.0))
    engine.add(request("early", priority=0, arrival_s=1.0))
    assert list(run(engine)) == ["late-but-urgent", "early"]


def test_an_abort_frees_the_blocks_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", num_prompt_tokens=60, max_tokens=100))
    engine.add(request("b", max_tokens=4, arrival_s=1.0))
    engine.step()
    engine.abort("a")
    engine.abort("unknown")
    assert list(run(engine)) == ["b"]


def test_a_passed_deadline_ends_the_request_with_an_error(make_engine: MakeEngine) -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    engine.add(request("a", max_tokens=50, deadline_s=101.0))
    engine.step()
    clock.now_s = 102.0
    (event,) = engine.step()
    assert event.finish_reason is FinishReason.ERROR
    assert event.error == "the deadline has passed"
    assert not engine.has_unfinished


def test_nonfinite_logits_end_only_their_own_request(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert isinstance(engine.runner, SimulatedRunner)
    engine.runner.nonfinite.add("bad")
    engine.add(request("good", seed=1))
    engine.add(request("bad", seed=2))
    events = run(engine)
    assert tokens_of(events["good"]) == expected(1, 0, 10)
    assert [event.finish_reason for event in events["bad"]] == [FinishReason.ERROR]
    assert engine.stats.num_nonfinite_logits == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("x", num_prompt_tokens=0), "prompt is empty"),
        (request("x", num_prompt_tokens=2048), "prompt has 2048 tokens, the limit is 2047"),
        (request("x", max_tokens=0), "max_tokens is 0"),
        (request("x", stop_token_ids=tuple(range(300))), "stop_token_ids has 300 ids, the limit is 256"),
    ],
)
def test_a_request_that_can_never_run_is_refused(make_engine: MakeEngine, bad: GenerationRequest, message: str) -> None:
    engine = make_engine()
    engine.add(request("good"))
    with pytest.raises(RequestError, match=message):
        engine.add(bad)
    assert list(run(engine)) == ["good"]


def test_the_longest_prompt_gets_the_one_token_that_there_is_room_for(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("running", num_prompt_tokens=200, max_tokens=90, seed=1))
    engine.step()
    engine.add(request("longest", num_prompt_tokens=2047, max_tokens=1000, seed=2, arrival_s=1.0))
    events = run(engine)
    assert tokens_of(events["longest"]) == expected(2, 0, 1)
    assert events["longest"][-1].finish_reason is FinishReason.LENGTH
    assert events["running"][-1].token_ids == expected(1, 89, 90)


def test_a_token_id_outside_the_vocabulary_is_refused(make_engine: MakeEngine) -> None:
    good = request("x")
    bad = GenerationRequest(
        request_id="x", prompt_token_ids=[1, 1000], sampling=good.sampling, arrival_s=good.arrival_s
    )
    with pytest.raises(RequestError, match="token id 1000 is outside the vocabulary of 1000"):
        make_engine().add(bad)


def test_capacity_counts_every_request_and_is_zero_while_one_waits(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_sequences=3)
    assert engine.capacity == 3
    engine.add(request("a"))
    engine.step()
    assert engine.capacity == 2
    engine.add(request("b"))
    assert engine.capacity == 0


def test_an_asynchronous_engine_launches_a_step_before_it_reads_the_one_before() -> None:
    engine = engine_over_simulation(True)
    runner = engine.runner
    assert isinstance(runner, SimulatedRunner)
    engine.add(request("a", max_tokens=5, seed=1))
    assert engine.step() == []
    assert (runner.num_launched, runner.num_collected) == (1, 0)
    for index in range(4):
        (event,) = engine.step()
        assert (event.index, event.token_ids) == (index, expected(1, index, index + 1))
        assert (runner.num_launched, runner.num_collected) == (index + 2, index + 1)
    (event,) = engine.step()  # nothing more to launch: the length is known beforehand
    assert event.finish_reason is FinishReason.LENGTH
    assert (runner.num_launched, runner.num_collected) == (5, 5)


def test_what_was_computed_beyond_a_stop_token_is_dropped_and_its_blocks_are_free_at_once() -> None:
    engine = engine_over_simulation(True)
    engine.add(request("a", seed=1, max_tokens=50, stop_token_ids=(token_at(1, 2),)))
    engine.add(request("b", seed=2, max_tokens=20, arrival_s=1.0))
    events: list[TokenEvent] = []
    while not any(event.finish_reason for event in events):
        events += engine.step()
        check_integrity(engine)
    assert engine.scheduler.block_manager.num_free == engine.scheduler.block_manager.num_blocks - 1
    engine.add(request("a", seed=3, max_tokens=4))  # the same id again, while the old one's last step is under way
    both = run(engine)
    assert tokens_of(both["a"]) == expected(3, 0, 4)
    assert tokens_of([event for event in events if event.request_id == "a"]) == expected(1, 0, 3)


@dataclass(frozen=True)
class Workload:
    """One request of a random workload; it stops early at token stop_at, if that is one of its own."""

    joins_at: int
    num_prompt_tokens: int
    max_tokens: int
    num_before: int
    priority: int
    stop_at: int
    aborted_at: int  # step, if it still runs then
    comes_back: bool  # at once, under the same id, as another request

    def request(self, key: str, seed: int) -> GenerationRequest:
        return request(
            key,
            num_prompt_tokens=self.num_prompt_tokens,
            max_tokens=self.max_tokens,
            seed=seed,
            priority=self.priority,
            arrival_s=float(self.joins_at),
            stop_token_ids=(token_at(seed, self.stop_at),),
        )

    @property
    def first_index(self) -> int:
        return min(self.num_before, min(self.max_tokens, self.stop_at + 1) - 1)

    def tokens(self, seed: int) -> list[int]:
        return expected(seed, self.first_index, min(self.max_tokens, self.stop_at + 1))


WORKLOADS = st.builds(
    Workload,
    joins_at=st.integers(0, 40),
    num_prompt_tokens=st.integers(1, 200),
    max_tokens=st.integers(1, 120),
    num_before=st.integers(0, 60),
    priority=st.integers(-1, 1),
    stop_at=st.integers(0, 200),
    aborted_at=st.integers(0, 400),
    comes_back=st.booleans(),
)


@pytest.mark.parametrize("is_asynchronous", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(8, 24),
    max_num_sequences=st.integers(1, 8),
    budget=st.integers(8, 100),
    workloads=st.lists(WORKLOADS, min_size=1, max_size=12),
)
def test_any_workload_ends_with_the_right_tokens(
    is_asynchronous: bool, num_blocks: int, max_num_sequences: int, budget: int, workloads: list[Workload]
) -> None:
    """Requests join, stop, are aborted and come back at any step; blocks are scarce."""
    engine = engine_over_simulation(is_asynchronous, num_blocks, max_num_sequences, budget)
    events: dict[str, list[TokenEvent]] = {}
    seeds = {str(i): i for i in range(len(workloads))}
    aborted: set[str] = set()

    def add(key: str) -> None:
        workload = workloads[int(key)]
        events[key] = []
        engine.add(workload.request(key, seeds[key]), expected(seeds[key], 0, workload.first_index))

    for step in range(20_000):
        for key, workload in ((str(i), workload) for i, workload in enumerate(workloads)):
            if workload.joins_at == step:
                add(key)
            is_running = key in events and not (events[key] and events[key][-1].finish_reason)
            if workload.aborted_at == step and is_running:
                engine.abort(key)
                aborted.add(key)
                if workload.comes_back:
                    aborted.discard(key)
                    seeds[key] += 500
                    add(key)
        if step > 400 and not engine.has_unfinished:
            break
        for event in engine.step():
            assert event.request_id not in aborted
            events[event.request_id].append(event)
        check_integrity(engine)
    assert not engine.has_unfinished, "a request starved"
    for key in seeds.keys() - aborted:
        workload = workloads[int(key)]
        assert tokens_of(events[key], workload.first_index) == workload.tokens(seeds[key])
