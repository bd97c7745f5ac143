"""Tool calls in a text that arrives in pieces.

What comes out is a function of the whole text, however it was cut. A call is sent as soon as its name is certain, its
arguments as they come, exactly as the model wrote them. What turns out to be no call is content, as it stands: no JSON,
no name, the name of no function that was offered. Blanks beside a call belong to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from nibble.service.gateway.json_scanner import JsonScanner
from nibble.service.gateway.tool_styles import ARGUMENTS_MARKER, ID_MARKER, ToolStyle

_BEFORE_OBJECT = " \t\r\n[,;"
_BETWEEN_CALLS = " \t\r\n,;]"
_ARGUMENTS_KEYS = ("arguments", "parameters")
# The beginning of most calls, up to their arguments. All else is read when the whole object is there.
_OBJECT_HEAD = re.compile(
    r'[\s\[,;]*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED_HEAD = re.compile(
    rf"\s*(?P<name>[\w.-]+)\s*(?:{re.escape(ID_MARKER)}\s*\w*\s*)?(?:{re.escape(ARGUMENTS_MARKER)})?\s*(?=\{{)"
)
_MAX_HEAD_CHARS = 256
_NAMED_HEAD_CHARS = re.compile(rf"[\w.\-\[\]\s]{{0,{_MAX_HEAD_CHARS}}}")
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"]*)"|[^\s"])')
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS_KEYS})


class CallDelta(NamedTuple):
    """What is new of one call. call: its index. id and name: with its first delta alone."""

    call: int
    id: str | None
    name: str | None
    arguments: str


class ToolCallParser:
    """State of one choice. num_calls: that began. is_open: the last one's arguments have not ended."""

    __slots__ = (
        "_after_call",
        "_blank",
        "_buffer",
        "_call_id",
        "_calls",
        "_content",
        "_has_begun",
        "_has_wrapper",
        "_is_final",
        "_marker",
        "_names",
        "_read",
        "_scanned",
        "_scanner",
        "_style",
        "is_open",
        "num_calls",
    )

    def __init__(self, style: ToolStyle, names: Collection[str], call_id: Callable[[int], str]) -> None:
        """names: of the functions that were offered. call_id: the id of the call with this index."""
        self._style = style
        self._names = names
        self._call_id = call_id
        self._read: Callable[[], bool] = self._read_content  # one step; false: it needs more text
        self._buffer = ""  # not understood yet
        self._blank = ""  # at the end of the content, to be sent with what follows
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self._marker = ""  # what announced the call that is being read
        self._scanner = JsonScanner()
        self._scanned = 0
        self._has_begun = False  # the text, with something else than blanks
        self._has_wrapper = False  # the arguments are inside of an object
        self._is_final = False
        self.num_calls = 0
        self.is_open = False

    def push(self, text: str) -> None:
        self._buffer += text
        while self._buffer and self._read():
            pass

    def finish(self) -> None:
        """The text has ended; nothing is pushed afterwards."""
        self._is_final = True
        while self._buffer and self._read():
            pass
        if self._marker and not self._buffer and self._read == self._read_head:
            self._reject()
        if self._blank and not self.num_calls:
            self._content.append(self._blank)

    def take(self) -> tuple[str, list[CallDelta]]:
        """Content and calls that became certain since the last time."""
        content, calls = "".join(self._content), self._calls
        self._content, self._calls = [], []
        return content, calls

    def _read_content(self) -> bool:
        if not self._has_begun:
            stripped = self._buffer.lstrip()
            if not stripped and not self._is_final:
                return False
            self._has_begun = True
            if self._style.begins_text and stripped[:1] in ("{", "["):
                self._expect_call("")
                return True
        marker, buffer = self._style.marker, self._buffer
        position = buffer.find(marker) if marker else -1
        if position >= 0:
            self._say(buffer[:position])
            self._buffer = buffer[position + len(marker) :]
            self._expect_call(marker)
            return True
        num_held = 0 if self._is_final else overlap(buffer, marker)
        self._say(buffer[: len(buffer) - num_held])
        self._buffer = buffer[len(buffer) - num_held :]
        return False

    def _expect_call(self, marker: str) -> None:
        self._marker = marker
        self._scanner, self._scanned = JsonScanner(), 0
        self._read = self._read_head

    def _read_head(self) -> bool:
        match = _OBJECT_HEAD.match(self._buffer)
        self._has_wrapper = match is not None
        text = self._buffer.lstrip(_BEFORE_OBJECT)
        if match is None and text.startswith("{"):
            return self._read_whole_object(text)
        if match is None:
            can_be_named = bool(self._marker) and ARGUMENTS_MARKER in self._style.markers
            match = _NAMED_HEAD.match(text[: _MAX_HEAD_CHARS + 1]) if can_be_named else None
            if match is None:
                is_possible = not text or (can_be_named and _NAMED_HEAD_CHARS.fullmatch(text))
                return False if is_possible and not self._is_final else self._reject()
            self._buffer = text
        if match["name"] not in self._names:
            return self._reject()
        self._begin_call(match["name"])
        self._buffer = self._buffer[match.end() :]
        self._scanner = JsonScanner()
        self._read = self._read_arguments
        return True

    def _read_whole_object(self, text: str) -> bool:
        """A call that is written in another way than most; `text` begins with its bracket."""
        first_key = _FIRST_KEY.match(text)
        if first_key is not None and first_key[1] not in _KEYS:
            return self._reject()
        end = self._scanner.find_end(text[self._scanned :])
        if end < 0:
            self._scanned = len(text)
            return self._reject() if self._is_final else False
        end += self._scanned
        call = _read_call(text[:end])
        if call is None or call[0] not in self._names:
            return self._reject()
        self._begin_call(call[0])
        self._add_arguments(call[1])
        self._buffer = text[end:]
        self._end_arguments()
        return True

    def _begin_call(self, name: str) -> None:
        self._calls.append(CallDelta(self.num_calls, self._call_id(self.num_calls), name, ""))
        self.num_calls += 1
        self.is_open = True
        self._blank = ""

    def _add_arguments(self, text: str) -> None:
        index = self.num_calls - 1
        is_new = bool(self._calls) and self._calls[-1].call == index
        last = self._calls.pop() if is_new else CallDelta(index, None, None, "")
        self._calls.append(last._replace(arguments=last.arguments + text))

    def _read_arguments(self) -> bool:
        end = self._scanner.find_end(self._buffer)
        if end < 0:
            self._add_arguments(self._buffer)
            self._buffer = ""
            return False
        self._add_arguments(self._buffer[:end])
        self._buffer = self._buffer[end:]
        self._end_arguments()
        return True

    def _end_arguments(self) -> None:
        self.is_open = False
        self._read = self._read_wrapper if self._has_wrapper else self._read_end

    def _read_wrapper(self) -> bool:
        """The rest of the object around the arguments. Models forget its bracket."""
        text = self._buffer.lstrip()
        if not text:
            return False
        if text[0] == "}":
            self._buffer = text[1:]
        elif text[0] == ",":
            self._scanner = JsonScanner(depth=1)
            self._read = self._read_other_keys
            return True
        self._read = self._read_end
        return True

    def _read_other_keys(self) -> bool:
        end = self._scanner.find_end(self._buffer)
        self._buffer = self._buffer[end:] if end >= 0 else ""
        if end >= 0:
            self._read = self._read_end
        return end >= 0

    def _read_end(self) -> bool:
        """What closes a call, and what stands between two."""
        end = self._style.end
        text = self._buffer.lstrip() if end else self._buffer.lstrip(_BETWEEN_CALLS)
        if not self._is_final and (not text or (end and len(text) < len(end) and end.startswith(text))):
            return False
        if end and (text.startswith(end) or (self._is_final and end.startswith(text))):
            self._buffer = text[len(end) :]
        elif not end:
            self._buffer = text
            if text.startswith("{"):
                self._expect_call("")
                return True
        self._read = self._read_content
        return True

    def _reject(self) -> bool:
        """It is no call: the marker is content, and so is what follows, unless a call begins there."""
        self._say(self._marker)
        self._marker = ""
        self._read = self._read_content
        return True

    def _say(self, text: str) -> None:
        text = self._blank + text
        content = text.rstrip()
        self._blank = text[len(content) :]
        if content:
            self._content.append(content)


def overlap(text: str, marker: str) -> int:
    """How many characters at the end of the text could be the beginning of the marker."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of an object that is complete, or None if it is no call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = call.get("name")
    arguments: Any = next((call[key] for key in _ARGUMENTS_KEYS if call.get(key) is not None), {})
    if isinstance(arguments, str):
        return (name, arguments) if isinstance(name, str) and _is_object(arguments) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
