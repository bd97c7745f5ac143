"""Stop strings in a text that arrives in pieces.

The first stop string to be complete ends the text (of those complete at the same character, the longest). Text that
could be the beginning of a stop string is held back, so that no part of one is ever sent, and neither result depends
on how the text was cut into pieces. One Knuth-Morris-Pratt automaton per stop string: constant work per character.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Finds the stop strings of one choice. Each must be non-empty."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be sent, and whether a stop string was completed; nothing is pushed after that."""
        if not self._held and self._first_chars.isdisjoint(text):
            return text, False
        known = len(self._held)
        text = self._held + text
        for position in range(known, len(text)):
            char = text[position]
            longest = 0
            for automaton in self._automata:
                if (automaton.num_matched or automaton.first_char == char) and automaton.advance(char):
                    longest = max(longest, len(automaton.pattern))
            if longest:
                self._held = ""
                end = position + 1
                return text[: end if self._include_stop else end - longest], True
        num_held = max((automaton.num_matched for automaton in self._automata), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """Return what was held back: the text ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How many characters of the pattern the text so far ends with.

    Its table grows with what was matched: a request may have many choices and long patterns, of which few are ever met.
    """

    __slots__ = ("_fallback", "first_char", "num_matched", "pattern")

    def __init__(self, pattern: str) -> None:
        assert pattern, "an empty stop string matches everywhere"
        self.pattern = pattern
        self.first_char = pattern[0]
        self.num_matched = 0
        self._fallback = [0, 0]  # [n]: the longest proper border of pattern[:n], up to the longest match so far

    def advance(self, char: str) -> bool:
        """Take one more character; true when the text now ends with the pattern."""
        self.num_matched = self._longer(self.num_matched, char)
        if self.num_matched == len(self._fallback):
            self._fallback.append(self._longer(self._fallback[-1], char))
        return self.num_matched == len(self.pattern)

    def _longer(self, num_matched: int, char: str) -> int:
        """Characters of the pattern that a text ends with after this one, if it ended with so many before."""
        while num_matched and self.pattern[num_matched] != char:
            num_matched = self._fallback[num_matched]
        return num_matched + (self.pattern[num_matched] == char)
