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
        self._first_chars = "".join({stop[0] for stop in stops})
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that may be sent, and whether a stop string was completed; nothing is pushed after that."""
        if not self._held and not any(char in text for char in self._first_chars):
            return text, False
        known = len(self._held)
        text = self._held + text
        for position in range(known, len(text)):
            char = text[position]
            longest = 0
            for automaton in self._automata:
                if automaton.advance(char):
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
    """How many characters of the pattern the text so far ends with."""

    def __init__(self, pattern: str) -> None:
        assert pattern, "an empty stop string matches everywhere"
        self.pattern = pattern
        self.num_matched = 0
        self._fallback = [0] * (len(pattern) + 1)  # [n]: the longest proper border of pattern[:n]
        border = 0
        for length in range(2, len(pattern) + 1):
            while border and pattern[border] != pattern[length - 1]:
                border = self._fallback[border]
            border += pattern[border] == pattern[length - 1]
            self._fallback[length] = border

    def advance(self, char: str) -> bool:
        """Take one more character; true when the text now ends with the pattern."""
        while self.num_matched and self.pattern[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched]
        self.num_matched += self.pattern[self.num_matched] == char
        return self.num_matched == len(self.pattern)
