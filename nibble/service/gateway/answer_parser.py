"""What a model writes, taken apart into reasoning, content and tool calls, in pieces as it comes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nibble.service.gateway.tool_call_parser import CallDelta, ToolCallParser, overlap
from nibble.service.gateway.tool_styles import END_THINK, THINK, ToolStyle

_ID_CHARS = 9  # what Mistral's templates insist on


@dataclass(frozen=True)
class AnswerFormat:
    """How an answer is to be read. has_reasoning: it can begin with reasoning. is_thinking: the prompt has opened it
    already. style: of the calls of these functions, or None: there are none."""

    has_reasoning: bool = False
    is_thinking: bool = False
    style: ToolStyle | None = None
    function_names: frozenset[str] = frozenset()

    @property
    def markers(self) -> frozenset[str]:
        """Texts of tokens that must not be hidden from the parser."""
        thinking = frozenset({THINK, END_THINK}) if self.has_reasoning else frozenset[str]()
        return thinking | (self.style.markers if self.style else frozenset())


class Parts(NamedTuple):
    """What is new."""

    reasoning: str
    content: str
    calls: Sequence[CallDelta]


class ToolCall(NamedTuple):
    """A whole one. arguments: as the model wrote them."""

    id: str
    name: str
    arguments: str


class Answer:
    """A whole answer: what its parts come to."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._heads: list[tuple[str, str]] = []  # id and name of each call
        self._arguments: list[list[str]] = []

    def add(self, reasoning: str, content: str, calls: Sequence[CallDelta]) -> None:
        self._reasoning.append(reasoning)
        self._content.append(content)
        for delta in calls:
            if delta.id is not None and delta.name is not None:
                self._heads.append((delta.id, delta.name))
                self._arguments.append([])
            self._arguments[delta.call].append(delta.arguments)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def calls(self) -> list[ToolCall]:
        return [
            ToolCall(*head, "".join(arguments)) for head, arguments in zip(self._heads, self._arguments, strict=True)
        ]


class AnswerParser:
    """State of one choice. Blanks around reasoning belong to nothing.

    can_be_reasoning: what comes next is reasoning, or may turn out to begin it. is_reasoning: it is.
    """

    __slots__ = (
        "_blank",
        "_buffer",
        "_content",
        "_must_strip",
        "_reasoning",
        "_tools",
        "can_be_reasoning",
        "is_reasoning",
    )

    def __init__(self, format: AnswerFormat, choice_request_id: str) -> None:
        self.can_be_reasoning = format.has_reasoning
        self.is_reasoning = format.has_reasoning and format.is_thinking
        self._must_strip = self.is_reasoning  # blanks that come next
        self._buffer = ""
        self._blank = ""  # at the end of the reasoning
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._tools = (
            ToolCallParser(format.style, format.function_names, lambda index: _call_id(choice_request_id, index))
            if format.style
            else None
        )

    def push(self, text: str) -> None:
        if self.can_be_reasoning or self._must_strip:
            text = self._split(text)
        if text:
            self._push_content(text)

    def finish(self) -> None:
        """The text has ended; nothing is pushed afterwards."""
        if self.is_reasoning:
            self._reasoning.append(self._blank + self._buffer)
        elif self._buffer:
            self._push_content(self._buffer)
        self._buffer = ""
        if self._tools is not None:
            self._tools.finish()

    def take(self) -> Parts:
        """What became certain since the last time."""
        reasoning = "".join(self._reasoning)
        self._reasoning = []
        if self._tools is not None:
            return Parts(reasoning, *self._tools.take())
        content, self._content = "".join(self._content), []
        return Parts(reasoning, content, ())

    @property
    def has_whole_calls(self) -> bool:
        """Whether there are calls, and all of them have ended."""
        return self._tools is not None and self._tools.num_calls > 0 and not self._tools.is_open

    def _push_content(self, text: str) -> None:
        if self._tools is not None:
            self._tools.push(text)
        else:
            self._content.append(text)

    def _split(self, text: str) -> str:
        """Take what is reasoning; the rest."""
        text, self._buffer = self._buffer + text, ""
        if self.can_be_reasoning and not self.is_reasoning:
            stripped = text.lstrip()
            if len(stripped) < len(THINK) and THINK.startswith(stripped):
                self._buffer = text
                return ""
            self.can_be_reasoning = self.is_reasoning = self._must_strip = stripped.startswith(THINK)
            if not self.is_reasoning:
                return text
            text = stripped[len(THINK) :]
        if self._must_strip:
            text = text.lstrip()
            self._must_strip = not text
        return self._split_reasoning(text) if self.is_reasoning else text

    def _split_reasoning(self, text: str) -> str:
        end = text.find(END_THINK)
        num_held = overlap(text, END_THINK) if end < 0 else 0
        thought = self._blank + (text[: len(text) - num_held] if end < 0 else text[:end])
        reasoning = thought.rstrip()
        self._blank = thought[len(reasoning) :]
        if reasoning:
            self._reasoning.append(reasoning)
        if end < 0:
            self._buffer = text[len(text) - num_held :]
            return ""
        self.can_be_reasoning = self.is_reasoning = False
        text = text[end + len(END_THINK) :].lstrip()
        self._must_strip = not text
        return text


def _call_id(choice_request_id: str, index: int) -> str:
    """The same whenever the same tokens are read again."""
    return hashlib.blake2b(f"{choice_request_id}/{index}".encode()).hexdigest()[:_ID_CHARS]
