"""Stop strings over every way of cutting a text into pieces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.service.gateway.schema.sampling import MAX_CHOICES, MAX_STOP_CHARS, MAX_TEXT_STOPS
from nibble.service.gateway.stops import StopScanner

short_text = st.text(alphabet="ab\n", max_size=14)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def scan(pieces: Sequence[str], stops: Sequence[str], *, include_stop: bool = False) -> tuple[list[str], bool]:
    scanner = StopScanner(stops, include_stop=include_stop)
    sent = []
    for piece in pieces:
        text, is_stopped = scanner.push(piece)
        sent.append(text)
        if is_stopped:
            return sent, True
    return [*sent, scanner.flush()], False


def expected(text: str, stops: Sequence[str], *, include_stop: bool) -> tuple[str, bool]:
    """The first position at which a stop string is complete; the longest of those that are."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end if include_stop else end - max(map(len, complete))], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(text=short_text, stops=stop_lists, cuts=st.lists(st.integers(0, 14), max_size=14), include_stop=st.booleans())
def test_result_does_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int], include_stop: bool) -> None:
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    sent, is_stopped = scan(pieces, stops, include_stop=include_stop)
    assert ("".join(sent), is_stopped) == expected(text, stops, include_stop=include_stop)


@settings(max_examples=300, deadline=None)
@given(text=short_text, stops=stop_lists)
def test_nothing_that_may_belong_to_a_stop_string_is_sent(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    sent, seen = "", ""
    for char in text:
        piece, is_stopped = scanner.push(char)
        sent, seen = sent + piece, seen + char
        if is_stopped:
            return
        longest = max(n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n]))
        assert sent == seen[: len(seen) - longest], "held exactly what could still become a stop string"


def test_stop_string_across_pieces_leaks_no_prefix() -> None:
    assert scan(["Hello <", "|e", "nd|> never"], ["<|end|>"]) == (["Hello ", "", ""], True)


def test_false_start_is_sent_after_all() -> None:
    assert scan(["a<", "b", "<|"], ["<|end|>"]) == (["a", "<b", "", "<|"], False)


def test_stop_string_is_shown_when_asked_for() -> None:
    assert scan(["one\n", "\ntwo"], ["\n\n"], include_stop=True) == (["one", "\n\n"], True)


def test_earliest_complete_stop_string_wins() -> None:
    assert scan(["xabcdef"], ["cd", "abcde"]) == (["xab"], True)


def test_of_two_complete_at_once_the_longest_is_cut() -> None:
    assert scan(["xabc"], ["c", "abc"]) == (["x"], True)


@pytest.mark.parametrize("stop", ["日本", "😀", "é"])
def test_any_character_can_stop(stop: str) -> None:
    assert scan([f"before{stop}after"], [stop]) == (["before"], True)


def test_stop_strings_cost_what_is_matched_of_them() -> None:
    """All choices of a request are made at once, and no other client is served in that time."""
    stops = [f"{'a' * (MAX_STOP_CHARS - 1)}{chr(98 + i)}" for i in range(MAX_TEXT_STOPS)]
    begun_s = time.process_time()
    scanners = [StopScanner(stops) for _ in range(MAX_CHOICES)]
    assert time.process_time() - begun_s < 0.2
    assert scanners[0].push("a" * MAX_STOP_CHARS + "c") == ("a", True)
