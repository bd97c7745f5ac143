"""The text of a choice does not depend on how its tokens were grouped into events."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan
from small_models import byte_level_tokenizer

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.detokenizer import detokenizer_factory

TOKENIZER = byte_level_tokenizer()
MAKE_DETOKENIZER = detokenizer_factory(TOKENIZER)
END = TOKENIZER.token_to_id("<|im_end|>")
METRICS = RequestMetrics(prompt_tokens=3, cached_tokens=1, generated_tokens=9, queue_s=0, prefill_s=0, decode_s=0)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def run(
    ids: Sequence[int], reason: FinishReason | None, cuts: Sequence[int] = (), **options: object
) -> tuple[str, FinishReason | None, int, Choice]:
    """Text, reason and count of a choice that is given these tokens in groups that end at the cuts."""
    choice = Choice(make_plan(stop_token_ids=(END,), **options), MAKE_DETOKENIZER(True))
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    groups = [list(ids[start:end]) for start, end in pairwise(bounds)]
    text = ""
    for number, group in enumerate(groups):
        if choice.finish_reason is not None:
            break
        is_last = number == len(groups) - 1
        text += choice.push(
            TokenEvent(
                request_id="x",
                index=0,
                token_ids=group,
                finish_reason=reason if is_last else None,
                metrics=METRICS if is_last else None,
            )
        )
    return text, choice.finish_reason, choice.num_tokens, choice


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(3, 300), max_size=30),
    is_stopped=st.booleans(),
    cuts=st.lists(st.integers(0, 31), max_size=8),
    stops=st.lists(st.text(alphabet="abe ", min_size=1, max_size=2), max_size=2),
    min_tokens=st.integers(0, 10),
    include_stop=st.booleans(),
)
def test_grouping_changes_nothing(
    ids: list[int], is_stopped: bool, cuts: list[int], stops: list[str], min_tokens: int, include_stop: bool
) -> None:
    all_ids = [*ids, END] if is_stopped else ids
    reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
    options = {"stops": tuple(stops), "min_tokens": min_tokens, "include_stop": include_stop}
    assert run(all_ids, reason, cuts, **options)[:3] == run(all_ids, reason, **options)[:3]


def test_end_of_sequence_token_is_counted_and_not_shown() -> None:
    ids = [*encode("fox"), END]
    assert run(ids, FinishReason.STOP)[:3] == ("fox", FinishReason.STOP, len(ids))


def test_stop_token_that_is_plain_text_is_shown_only_when_asked_for() -> None:
    ids = encode("fox") + encode("x")
    choice_options = {"stop_token_ids": (ids[-1],)}
    plan = make_plan(**choice_options)
    event = TokenEvent(request_id="x", index=0, token_ids=ids, finish_reason=FinishReason.STOP)
    assert Choice(plan, MAKE_DETOKENIZER(True)).push(event) == "fox"
    plan = make_plan(**choice_options, include_stop=True)
    assert Choice(plan, MAKE_DETOKENIZER(True)).push(event) == "foxx"


def test_last_token_of_a_generation_that_hit_its_limit_is_shown() -> None:
    assert run(encode("fox"), FinishReason.LENGTH)[:2] == ("fox", FinishReason.LENGTH)


def test_stop_string_ends_the_choice_before_the_engine_does() -> None:
    ids = encode("one two three")
    text, reason, num_tokens, choice = run(ids, None, range(len(ids)), stops=(" t",))
    assert (text, reason) == ("one", FinishReason.STOP)
    assert num_tokens < len(ids), "tokens after the stop string do not count"
    assert not choice.is_stream_done, "the engine has to be told"


def test_stop_string_in_the_last_event_needs_no_telling() -> None:
    choice = run(encode("one two"), FinishReason.LENGTH, stops=("two",))[3]
    assert choice.finish_reason is FinishReason.STOP
    assert choice.is_stream_done
    assert choice.metrics is METRICS


def test_held_text_is_flushed_at_the_end() -> None:
    assert run(encode("one <"), FinishReason.LENGTH, stops=("<|end|>",))[0] == "one <"


def test_incomplete_character_at_the_end_is_flushed() -> None:
    assert run(encode("a😀")[:-1], FinishReason.LENGTH)[0].endswith("\ufffd")


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = encode("a b a b")
    assert run(ids, FinishReason.LENGTH, stops=("b",))[0] == "a "
    assert run(ids, FinishReason.LENGTH, stops=("b",), min_tokens=len(ids))[0] == "a b a "
