"""Drafts and the decision who gets some, without a model: on sequences alone, and over a simulated one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import ReplayDrafter
from simulated import CONFIG, VOCAB_SIZE, SimulatedRunner, request, token_at

from nibble.engine.batch import MAX_VERIFIED_TOKENS
from nibble.engine.limits import MAX_DRAFTS, EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import MATCH_LENGTHS, SYNCHRONOUS, NgramDrafter, Speculation, asynchronous_cost, verify

COSTS = {False: SYNCHRONOUS, True: asynchronous_cost(2.06e-3)}


def sequence(token_ids: list[int], max_tokens: int = 1000, **sampling: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type] # of any field
    each = GenerationRequest(request_id="a", prompt_token_ids=token_ids, sampling=params, arrival_s=0.0)
    return Sequence.start(each, [], 100_000, 0.0)


@pytest.mark.parametrize(
    ("drafts", "drawn", "tokens"),
    [
        ([], [5], [5]),
        ([5, 6], [5, 6, 7], [5, 6, 7]),
        ([5, 6], [5, 8, 7], [5, 8]),
        ([5, 6], [4, 6, 7], [4]),
        ([5, 6, 9], [5, 7], [5, 7]),  # the last drafts were not computed
        ([], [-1], []),
        ([5, 6], [-1, 6, 7], []),
        ([5, 6], [5, -1, 7], [5]),
        ([5, 6], [5, 6, -1], [5, 6]),
        ([5, 6], [4, -1, -1], [4]),
    ],
)
def test_tokens_stand_up_to_the_first_that_was_guessed_wrong(
    drafts: list[int], drawn: list[int], tokens: list[int]
) -> None:
    assert verify(drafts, drawn) == tokens


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40), st.integers(1, 8))
def test_ngrams_continue_as_the_newest_tokens_did_before(tokens: list[int], num_known: int, count: int) -> None:
    """Against a search of all places, of a text that comes in two parts."""
    drafter, owner = NgramDrafter(), sequence(tokens[: num_known or 1])
    drafter.propose({owner: 1})
    owner.token_ids = tokens[: num_known or 1] + tokens[num_known or 1 :]
    expected: list[int] = []
    for length in MATCH_LENGTHS:
        places = [i for i in range(len(tokens) - length) if tokens[i : i + length] == tokens[len(tokens) - length :]]
        if places and length <= len(tokens):
            expected = tokens[places[-1] + length :]
            break
    while expected and len(expected) < count:
        expected = expected + expected
    assert drafter.propose({owner: count}) == [expected[:count]]
    assert drafter.is_promising(owner) == bool(expected)


def test_ids_are_whole_whatever_they_are_as_characters() -> None:
    """Halves of surrogate pairs, a combining accent, the largest."""
    owner = sequence([0xD83D, 0xDE00, 7, 0x1F600, 0x0301, 0xD83D, 0xDE00])
    assert NgramDrafter().propose({owner: 2}) == [[7, 0x1F600]]
    owner = sequence([0xD83D, 0xDE00, 7, 0x10FFFF, 0x1F600, 0x10FFFF, 0x1F600])
    assert NgramDrafter().propose({owner: 1}) == [[0x10FFFF]]
    owner = sequence([0xD83D, 0xDE00, 7, 0x1F600])
    assert NgramDrafter().propose({owner: 1}) == [[]]


def test_what_is_forgotten_leaves_nothing() -> None:
    drafter, owner = NgramDrafter(), sequence([1, 2, 3])
    drafter.propose({owner: 1})
    drafter.forget(owner)
    drafter.forget(owner)
    assert not drafter._texts


def speculation(is_asynchronous: bool = False, num_drafts: int = MAX_DRAFTS) -> Speculation:
    return Speculation(NgramDrafter(), num_drafts, COSTS[is_asynchronous])


def test_the_more_sequences_there_are_the_surer_a_draft_has_to_be() -> None:
    for is_asynchronous in (False, True):
        decide = speculation(is_asynchronous)
        for acceptance in (0.05, 0.3, 0.7, 0.95, 1.0):
            counts = [decide.max_drafts(acceptance, n) for n in range(1, MAX_VERIFIED_TOKENS + 1)]
            assert counts == sorted(counts, reverse=True)
            assert counts[-1] == 0
        assert decide.max_drafts(1.0, 1) == MAX_DRAFTS
        assert decide.max_drafts(0.01, 8) == 0
    assert speculation(False).max_drafts(0.7, 16) == 0  # a CPU has enough to do
    assert speculation(True).max_drafts(0.7, 16) > 2  # a GPU does not notice


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_wrong_drafts_get_fewer_then_none_and_are_tried_again_much_later(is_asynchronous: bool) -> None:
    decide, owner = speculation(is_asynchronous), sequence([1, 2, 3] * 5)
    sizes = []
    for _ in range(300):
        decide.draft([owner], 4)
        sizes.append(len(owner.drafts))
        decide.learn([(owner, [0])])
        owner.drafts = []
    first_none = sizes.index(0)
    assert sizes[:first_none] == sorted(sizes[:first_none], reverse=True)
    assert first_none < 12
    assert 0 < sum(size > 0 for size in sizes[50:]) < 25
    assert owner.num_accepted_tokens == 0
    assert owner.num_draft_tokens == decide.num_draft_tokens == sum(sizes)


def test_right_drafts_get_more() -> None:
    decide, owner = speculation(), sequence([1, 2, 3] * 5)
    owner.acceptance = 0.3
    for _ in range(8):
        decide.draft([owner], 1)
        decide.learn([(owner, [0] * (1 + len(owner.drafts)))])
    assert len(owner.drafts) == MAX_DRAFTS
    assert decide.num_accepted_tokens == decide.num_draft_tokens


def test_drafts_of_few_among_many_are_not_worth_that_all_wait() -> None:
    decide = speculation(is_asynchronous=True)
    owner = sequence([1, 2, 3] * 5)
    decide.draft([owner], 4)
    assert owner.drafts
    decide.draft([owner], 24)
    assert not owner.drafts
    many = [sequence([1, 2, 3] * 5) for _ in range(24)]
    for each in many:
        each.acceptance = 0.95
    decide.draft(many, 24)
    assert all(each.drafts for each in many)


def test_unread_tokens_are_waited_for_where_drafts_will_come() -> None:
    decide = speculation(is_asynchronous=True)
    copying, other = sequence([1, 2, 3] * 5), sequence(list(range(30)))
    for each in (copying, other):
        each.num_unread_tokens = 1
    assert not decide.draft([other], 2)
    assert decide.draft([copying, other], 2)
    assert not copying.drafts
    copying.acceptance = 0.01
    assert not decide.draft([copying, other], 2)


def test_no_draft_goes_beyond_the_last_token_or_to_who_may_not_have_any() -> None:
    decide = speculation()
    for max_tokens in (1, 2, 4):
        owner = sequence([1, 2, 3] * 5, max_tokens)
        decide.draft([owner], 1)
        assert len(owner.drafts) == max_tokens - 1
    for sampling in (
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"bad_words_token_ids": ((1,), (2, 3))},
    ):
        owner = sequence([1, 2, 3] * 5, **sampling)
        decide.draft([owner], 1)
        assert not owner.drafts
    owner = sequence(
        [1, 2, 3] * 5, logit_bias=((1, 1.0),), bad_words_token_ids=((9,),), min_tokens=5, stop_token_ids=(7,)
    )
    decide.draft([owner], 1)
    assert owner.drafts


class Traffic:
    """Requests of one engine over a simulated model, and what they have got."""

    def __init__(self, engine: LLMEngine, expected: dict[str, list[int]]) -> None:
        self.engine = engine
        self.expected = expected
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}

    def add(self, each: GenerationRequest, num_done: int) -> None:
        """The first num_done tokens were generated elsewhere."""
        self.outputs[each.request_id] = self.expected[each.request_id][:num_done]
        self.engine.add(each, self.outputs[each.request_id])

    def step(self) -> None:
        for event in self.engine.step():
            name = event.request_id
            assert name not in self.reasons
            assert event.index == len(self.outputs[name])
            self.outputs[name] += event.token_ids
            if event.finish_reason is not None:
                self.reasons[name] = event.finish_reason
        scheduler = self.engine.scheduler
        tables = [each.block_table for each in [*scheduler.running, *scheduler.waiting]]
        scheduler.block_manager.check_integrity(tables)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_draft_changes_a_token_whatever_else_happens(data: st.DataObject) -> None:
    """Too few blocks, stop tokens, resumed and aborted requests, on a runner that checks what is in each slot."""
    draw, is_asynchronous = data.draw, data.draw(st.booleans())
    names = [str(i) for i in range(draw(st.integers(1, 9)))]
    lengths = {name: draw(st.integers(1, 120)) for name in names}
    stops_at = {name: draw(st.integers(0, 200)) for name in names}
    outputs = {name: [token_at(int(name), i) for i in range(lengths[name])] for name in names}
    limits = EngineLimits(
        0, max_num_sequences=draw(st.integers(1, 9)), max_num_batched_tokens=draw(st.integers(9, 200))
    )
    engine = LLMEngine(SimulatedRunner(draw(st.integers(5, 12)), 200, is_asynchronous), CONFIG, limits, lambda: 0.0)
    drafter = ReplayDrafter(outputs, draw(st.sampled_from([0.3, 0.9, 1.0])), VOCAB_SIZE)
    engine.speculation = Speculation(drafter, draw(st.integers(1, MAX_DRAFTS)), COSTS[is_asynchronous])
    traffic = Traffic(engine, {name: outputs[name][: stops_at[name] + 1] for name in names})
    for name in names:
        each = request(
            name,
            num_prompt_tokens=draw(st.integers(1, 130)),
            max_tokens=lengths[name],
            seed=int(name),
            arrival_s=draw(st.sampled_from([0.0, 1.0])),
            priority=draw(st.integers(0, 1)),
            stop_token_ids=(token_at(int(name), stops_at[name]),),
        )
        traffic.add(each, draw(st.integers(0, len(traffic.expected[name]) - 1)))
        for _ in range(draw(st.integers(0, 12))):
            traffic.step()
    aborted = draw(st.sampled_from(names))
    engine.abort(aborted)
    while engine.has_unfinished:
        traffic.step()
    if aborted not in traffic.reasons:
        traffic.expected[aborted] = traffic.expected[aborted][: len(traffic.outputs[aborted])]
    assert traffic.outputs == traffic.expected
    assert len(drafter.forgotten) == len(names)


def test_one_sequence_takes_a_step_for_each_run_of_right_drafts() -> None:
    outputs = {"0": [token_at(0, i) for i in range(81)]}
    for is_asynchronous in (False, True):
        engine = LLMEngine(SimulatedRunner(9, 200, is_asynchronous), CONFIG, EngineLimits(0), lambda: 0.0)
        engine.speculation = Speculation(ReplayDrafter(outputs, 1.0, VOCAB_SIZE), 7, COSTS[is_asynchronous])
        traffic = Traffic(engine, outputs)
        traffic.add(request("0", max_tokens=81), 0)
        while engine.has_unfinished:
            traffic.step()
        stats = engine.stats
        assert stats.num_steps < 1 + 10 + 4  # the first has one token, the next ones few drafts
        assert stats.num_generated_tokens == 81
        assert stats.num_accepted_tokens == stats.num_draft_tokens == 81 - stats.num_steps


def test_without_drafts_that_pay_steps_overlap_as_ever() -> None:
    """The runner of an asynchronous device has two steps at once; a drafter that is never right stops that briefly."""
    outputs = {"0": [token_at(0, i) for i in range(300)]}
    engine = LLMEngine(SimulatedRunner(9, 200, True), CONFIG, EngineLimits(0), lambda: 0.0)
    engine.speculation = Speculation(ReplayDrafter(outputs, 0.0, VOCAB_SIZE), 7, COSTS[True])
    traffic = Traffic(engine, outputs)
    traffic.add(request("0", max_tokens=300), 0)
    num_overlapping = 0
    while engine.has_unfinished:
        traffic.step()
        num_overlapping += len(engine._pending) == 1 and not engine._reads_first
    assert traffic.outputs == outputs
    assert num_overlapping > 240


def test_logits_that_are_not_finite_behind_a_draft_end_the_request_after_it() -> None:
    for is_asynchronous in (False, True):
        outputs = {"0": [token_at(0, i) for i in range(50)]}
        runner = SimulatedRunner(9, 200, is_asynchronous)
        engine = LLMEngine(runner, CONFIG, EngineLimits(0), lambda: 0.0)
        engine.speculation = Speculation(ReplayDrafter(outputs, 1.0, VOCAB_SIZE), 7, COSTS[is_asynchronous])
        traffic = Traffic(engine, outputs)
        traffic.add(request("0", max_tokens=50), 0)
        runner.nonfinite_from["0"] = 20
        while engine.has_unfinished:
            traffic.step()
        assert traffic.outputs == {"0": outputs["0"][:20]}
        assert traffic.reasons == {"0": FinishReason.ERROR}
