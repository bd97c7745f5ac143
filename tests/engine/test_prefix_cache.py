"""The prefix cache over a simulated model: what is found computed, what must not be, and that nothing else changes.

The simulated runner refuses a context whose content, or the arithmetic it was computed with, is not what the sequence
itself would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from simulated import CONFIG, SimulatedRunner, request, token_at

from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent

MakeEngine = Callable[..., LLMEngine]
PREFIX = [7 + i % 900 for i in range(1000)]


def engine_over_simulation(
    is_asynchronous: bool,
    num_blocks: int = 64,
    max_num_sequences: int = 8,
    budget: int = 64,
    has_prefix_cache: bool = True,
    num_swap_blocks: int = 0,
) -> LLMEngine:
    limits = EngineLimits(0, max_num_sequences, budget, has_prefix_cache=has_prefix_cache)
    runner = SimulatedRunner(num_blocks, budget, is_asynchronous, num_swap_blocks)
    return LLMEngine(runner, CONFIG, limits, lambda: 100.0)


@pytest.fixture(params=["synchronous", "asynchronous"])
def make_engine(request: pytest.FixtureRequest) -> MakeEngine:
    return partial(engine_over_simulation, request.param == "asynchronous")


def check_integrity(engine: LLMEngine) -> None:
    scheduler = engine.scheduler
    scheduler.block_manager.check_integrity([s.block_table for s in [*scheduler.running, *scheduler.waiting]])
    scheduler.swap_space.check_integrity(scheduler.waiting)


def run(engine: LLMEngine, *requests: GenerationRequest) -> dict[str, TokenEvent]:
    """Add the requests and run to the end of all; the last event of each."""
    for each in requests:
        engine.add(each)
    last: dict[str, TokenEvent] = {}
    while engine.has_unfinished:
        for event in engine.step():
            last[event.request_id] = event
        check_integrity(engine)
    return last


def cached_tokens(event: TokenEvent) -> int:
    assert event.metrics is not None
    return event.metrics.cached_tokens


def turn(name: str, prompt: list[int], seed: int = 0, **options: int | str) -> GenerationRequest:
    return request(name, prompt=prompt, seed=seed, **options)  # type: ignore[arg-type]  # options are its own


@pytest.mark.parametrize(
    ("num_common", "num_prompt", "num_cached"),
    [
        (200, 250, 192),
        (63, 250, 0),
        (64, 165, 64),
        (128, 129, 128),
        (256, 256, 192),
        (256, 257, 256),
        (192, 193, 192),
        (1, 1, 0),
    ],
)
def test_full_blocks_of_a_common_prefix_are_found_but_one_token_is_always_computed(
    make_engine: MakeEngine, num_common: int, num_prompt: int, num_cached: int
) -> None:
    engine = make_engine()
    run(engine, turn("first", PREFIX[:num_common] + [1] * 100))
    before = engine.stats.num_prompt_tokens
    second = run(engine, turn("second", PREFIX[:num_common] + [2] * (num_prompt - num_common)))["second"]
    assert cached_tokens(second) == num_cached
    assert engine.stats.num_prompt_tokens - before == num_prompt - num_cached
    assert engine.stats.num_cache_queries == num_common + 100 + num_prompt
    assert engine.stats.num_cache_hits == num_cached


def test_short_prompts_find_what_was_computed_in_their_mode(make_engine: MakeEngine) -> None:
    """A GPU computes them in DECODE mode, with other rounding than longer ones, which find nothing of theirs."""
    engine = make_engine()
    run(engine, turn("short", PREFIX[:100]))
    assert cached_tokens(run(engine, turn("other", [*PREFIX[:64], 1]))["other"]) == 64
    is_split = engine.runner.kernels.num_prefill_tokens(100) == 0
    assert cached_tokens(run(engine, turn("long", PREFIX[:64] + [1] * 100))["long"]) == (0 if is_split else 64)


def test_the_first_and_the_last_event_tell_how_much_was_found(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run(engine, turn("first", PREFIX[:130]))
    engine.add(turn("second", PREFIX[:140], max_tokens=3))
    events: list[TokenEvent] = []
    while engine.has_unfinished:
        events += engine.step()
    assert [event.metrics and event.metrics.cached_tokens for event in events] == [128, None, 128]


def test_a_conversation_finds_all_prompts_of_its_earlier_turns(make_engine: MakeEngine) -> None:
    """What was generated is computed once more, as a prompt: its keys and values come from other arithmetic."""
    engine = make_engine()
    prompt, found = PREFIX[:150], []
    for number in range(4):
        event = run(engine, turn(str(number), prompt, seed=number, max_tokens=100))[str(number)]
        found.append(cached_tokens(event))
        prompt = [*prompt, *(token_at(number, i) for i in range(100)), *([3 + number] * 30)]
    assert found == [0, 128, 256, 384]  # of prompts of 150, 280, 410 and 540 tokens, each once again in the next


def test_generated_tokens_are_found_by_the_same_request_when_it_comes_back(make_engine: MakeEngine) -> None:
    """Under the arithmetic that computed them the first time: it goes on with the same tokens."""
    engine = make_engine()
    engine.add(turn("a", PREFIX[:100], seed=5, max_tokens=300))
    while engine.scheduler.running == [] or engine.scheduler.running[0].num_read_tokens < 200:
        engine.step()
    engine.abort("a")
    num_prompt_tokens, num_steps = engine.stats.num_prompt_tokens, engine.stats.num_steps
    engine.add(turn("a", PREFIX[:100], seed=5, max_tokens=300), [token_at(5, i) for i in range(200)])
    event = run(engine)["a"]
    assert (event.index, event.token_ids) == (299, [token_at(5, 299)])
    assert engine.stats.num_prompt_tokens == num_prompt_tokens
    assert engine.stats.num_steps - num_steps <= 100 + 1  # 256 tokens were there, so one step computes the rest


def test_choices_of_one_prompt_wait_for_the_first_and_compute_only_the_end_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine(budget=100)
    events = run(engine, *(turn(str(i), PREFIX[:330], seed=i, arrival_s=float(i)) for i in range(8)))
    assert [cached_tokens(events[str(i)]) for i in range(8)] == [0] + [320] * 7
    assert engine.stats.num_prompt_tokens == 330 + 7 * 10


def test_nobody_waits_for_a_prefix_that_one_behind_it_computes(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(turn("low", PREFIX[:600], arrival_s=0.0, priority=1))
    engine.step()
    engine.add(request("between", num_prompt_tokens=1000, seed=5, arrival_s=2.0))
    engine.add(turn("high", PREFIX[:600], seed=1, max_tokens=1, arrival_s=1.0))
    num_steps = 0
    while not any(event.request_id == "high" for event in engine.step()):
        num_steps += 1
    assert num_steps <= 600 // 64 + 1
    run(engine)


def test_if_the_one_waited_for_is_aborted_the_next_computes_the_prefix(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(turn("first", PREFIX[:400], arrival_s=0.0))
    engine.add(turn("second", PREFIX[:400], seed=1, arrival_s=1.0))
    engine.step()
    engine.step()
    engine.abort("first")
    assert cached_tokens(run(engine)["second"]) in (64, 128)


def test_requests_with_different_salts_share_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert cached_tokens(run(engine, turn("a", PREFIX[:300]))["a"]) == 0
    assert cached_tokens(run(engine, turn("b", PREFIX[:300], cache_salt="mine"))["b"]) == 0
    assert cached_tokens(run(engine, turn("c", PREFIX[:300], cache_salt="mine"))["c"]) == 256
    assert cached_tokens(run(engine, turn("d", PREFIX[:300], cache_salt="yours"))["d"]) == 0


def test_without_the_cache_nothing_is_found_or_kept(make_engine: MakeEngine) -> None:
    engine = make_engine(has_prefix_cache=False)
    for name in "abc":
        assert cached_tokens(run(engine, turn(name, PREFIX[:300]))[name]) == 0
    assert engine.stats.num_prompt_tokens == 900
    assert engine.scheduler.block_manager.num_cached == 0


def test_what_was_used_longest_ago_makes_room(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=12)
    for name, seed in (("a", 1), ("b", 2)):
        run(engine, request(name, num_prompt_tokens=300, seed=seed))  # five blocks each, four of them full
    assert cached_tokens(run(engine, request("a", num_prompt_tokens=300, seed=1))["a"]) == 256
    run(engine, request("c", num_prompt_tokens=300, seed=3))
    assert cached_tokens(run(engine, request("a", num_prompt_tokens=300, seed=1))["a"]) == 256
    assert cached_tokens(run(engine, request("b", num_prompt_tokens=300, seed=2))["b"]) < 256


def test_nobody_finds_what_led_to_logits_that_are_not_finite(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert isinstance(engine.runner, SimulatedRunner)
    engine.runner.nonfinite.add("bad")
    for max_tokens in (1, 5):  # the last token it may have, so that it is complete before it is read, or not
        event = run(engine, turn("bad", PREFIX[:300], max_tokens=max_tokens))["bad"]
        assert event.finish_reason is FinishReason.ERROR
        assert engine.scheduler.block_manager.num_cached == 0
    assert cached_tokens(run(engine, turn("good", PREFIX[:300]))["good"]) == 0


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks(make_engine: MakeEngine) -> None:
    """And does not count them as cached tokens: the client's prompt was computed for it."""
    engine = make_engine(num_blocks=16, budget=512)
    events = run(engine, *(request(str(i), num_prompt_tokens=200, max_tokens=200, seed=i) for i in range(4)))
    assert engine.stats.num_preemptions > 0
    assert [cached_tokens(event) for event in events.values()] == [0] * 4
    assert engine.stats.num_prompt_tokens < 800 + 200 * engine.stats.num_preemptions


class EngineMachine(RuleBasedStateMachine):
    """Requests with common prefixes, salts, priorities and tokens from before join, are aborted and come back at any
    step, conversations go on, blocks are scarce: all get their own tokens, and the books balance after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.engine: LLMEngine
        self.num_requests = 0
        self.running: dict[str, tuple[GenerationRequest, list[int]]] = {}
        self.ended: list[list[int]] = []  # all tokens of those that ended

    @initialize(
        is_asynchronous=st.booleans(),
        num_blocks=st.integers(8, 24),
        max_num_sequences=st.integers(1, 6),
        budget=st.integers(6, 300),
        has_prefix_cache=st.sampled_from([True, True, True, False]),
        num_swap_blocks=st.sampled_from([0, 5, 12, 30]),
    )
    def make(self, **options: int) -> None:
        self.engine = engine_over_simulation(**options)  # type: ignore[arg-type]  # bools are ints

    @rule(
        num_common=st.sampled_from([0, 60, 64, 100, 128, 200]),
        num_own=st.integers(0, 150),
        family=st.integers(0, 1),
        num_before=st.sampled_from([0, 0, 1, 70]),
        num_choices=st.integers(1, 3),
        data=st.data(),
    )
    def add(
        self, num_common: int, num_own: int, family: int, num_before: int, num_choices: int, data: st.DataObject
    ) -> None:
        prompt = [*PREFIX[family : family + num_common], *([family + 1] * num_own)] or [1]
        self.submit(prompt, num_before, num_choices, data)

    @rule(data=st.data())
    def go_on_with_a_conversation(self, data: st.DataObject) -> None:
        if self.ended:
            self.submit([*data.draw(st.sampled_from(self.ended)), 5, 6, 7][-380:], 0, 1, data)

    @rule(data=st.data(), is_coming_back=st.booleans())
    def abort(self, data: st.DataObject, is_coming_back: bool) -> None:
        if self.running:
            name = data.draw(st.sampled_from(sorted(self.running)))
            self.engine.abort(name)
            each, tokens = self.running.pop(name)
            if is_coming_back:  # as from a worker that was lost
                self.engine.add(each, tokens)
                self.running[name] = (each, tokens)

    @rule(num_steps=st.integers(1, 40))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for event in self.engine.step():
                each, tokens = self.running[event.request_id]
                assert event.index == len(tokens)
                tokens += event.token_ids
                if event.finish_reason is not None:
                    assert event.finish_reason is FinishReason.LENGTH
                    assert tokens == [token_at(each.sampling.seed, i) for i in range(each.sampling.max_tokens)]
                    self.ended.append([*each.prompt_token_ids, *tokens])
                    del self.running[event.request_id]
            check_integrity(self.engine)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "engine"):
            check_integrity(self.engine)
            scheduler = self.engine.scheduler
            assert len(scheduler.running) <= scheduler.max_num_sequences
            for sequences in (scheduler.running, scheduler.waiting):
                assert sequences == sorted(sequences, key=lambda sequence: sequence.rank)

    def teardown(self) -> None:
        for _ in range(20_000):
            if not self.running:
                break
            self.step(1)
        assert not self.running, "a request starved"

    def submit(self, prompt: list[int], num_before: int, num_choices: int, data: st.DataObject) -> None:
        max_tokens = data.draw(st.integers(num_before + 1, 100))
        priority, salt = data.draw(st.integers(-1, 1)), data.draw(st.sampled_from(["", "", "salt"]))
        for _ in range(num_choices):
            self.num_requests += 1
            name, seed = str(self.num_requests), self.num_requests % 7
            each = request(
                name,
                prompt=prompt,
                seed=seed,
                max_tokens=max_tokens,
                priority=priority,
                arrival_s=float(self.num_requests),
                cache_salt=salt,
            )
            tokens = [token_at(seed, i) for i in range(num_before)]
            self.engine.add(each, tokens)
            self.running[name] = (each, tokens)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
