"""Where a JSON object ends, in text that comes in pieces. What is between its brackets need not be JSON."""

from __future__ import annotations

import re

_OUTSIDE_OF_STRINGS = re.compile(r'["{}\[\]]')
_INSIDE_OF_A_STRING = re.compile(r'["\\]')


class JsonScanner:
    """Counts brackets outside of strings. depth: those that are open already."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string")

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = False
        self._is_escaped = False

    def find_end(self, text: str) -> int:
        """Take the next piece. The position after the bracket that closes the first one, or -1."""
        position = 0
        while position < len(text):
            if self._is_escaped:
                self._is_escaped = False
                position += 1
                continue
            match = (_INSIDE_OF_A_STRING if self._is_in_string else _OUTSIDE_OF_STRINGS).search(text, position)
            if match is None:
                return -1
            position = match.end()
            char = match[0]
            if char == '"':
                self._is_in_string = not self._is_in_string
            elif char == "\\":
                self._is_escaped = True
            else:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return position
        return -1
