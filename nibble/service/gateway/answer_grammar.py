"""What a whole answer must be: reasoning, then calls as the model's style has them, or what the text has to be.

A grammar is needed where something of this is enforced. It is written in the style that the parser reads, with the
tokens that the model was taught: those that llguidance takes for special ones are no text, and are named by their ids.
Source of the notation: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nibble.engine.protocol import GrammarKind, GrammarSpec
from nibble.grammar.compiler import WHITESPACE
from nibble.service.gateway.answer_parser import AnswerFormat
from nibble.service.gateway.structured_output import GrammarChecker
from nibble.service.gateway.tool_choice import OfferedTool, ToolUse
from nibble.service.gateway.tool_styles import ARGUMENTS_MARKER, END_THINK, THINK, ToolStyle

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


async def answer_grammar(
    grammars: GrammarChecker, use: ToolUse | None, format: AnswerFormat, content: GrammarSpec | None
) -> GrammarSpec | None:
    """content: what the text must be where it is no call; checked. Raises InvalidRequest."""
    has_calls = use is not None and (use.is_enforced or content is not None)
    if not has_calls and (content is None or not format.has_reasoning):
        return content
    tools = use.tools if use is not None else ()
    schemas = [tool.schema if _is_enforced(tool, use) else _ANY_OBJECT for tool in tools]
    for tool, schema in zip(tools, schemas, strict=True):
        spec = GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":")))
        await grammars.check(spec, f"{tool.field}.parameters", what=f" of {tool.name}")
    writer = _Writer(format, await grammars.special_tokens(format.markers))
    spec = writer.spec(use, schemas, content)
    await grammars.check(spec, "tools" if use is not None else "response_format")
    return spec


def _is_enforced(tool: OfferedTool, use: ToolUse | None) -> bool:
    return tool.is_strict or (use is not None and use.is_required)


class _Writer:
    """Writes one grammar."""

    def __init__(self, format: AnswerFormat, special_tokens: Mapping[str, int]) -> None:
        self._format = format
        self._special_tokens = special_tokens
        self._rules: list[str] = []
        self._parts: dict[str, tuple[GrammarKind, str]] = {}

    def spec(self, use: ToolUse | None, schemas: list[Mapping[str, Any]], content: GrammarSpec | None) -> GrammarSpec:
        style, answers = self._format.style, []
        if use is None or not use.is_required:
            answers.append(self._content(content, style))
        if use is not None and style is not None:
            has_text_before = content is None and not use.is_required and not style.begins_text
            answers.append(self._calls(use, schemas, style, has_text_before))
        start = f"start: {self._thought()} ({' | '.join(answers)})"
        lark = "\n".join([start, *self._rules])
        parts = {name: [kind.value, text] for name, (kind, text) in self._parts.items()}
        return GrammarSpec(GrammarKind.COMPOSED, json.dumps({"lark": lark, "parts": parts}, separators=(",", ":")))

    def _thought(self) -> str:
        """Anything until its end is written."""
        if not self._format.has_reasoning:
            return ""
        thought = f"{self._text_until('THOUGHT', END_THINK)} BLANK"
        self._rules += [r"BLANK: /\s{0,4}/", f"THOUGHT: /(?s:.+)/ & {_without(END_THINK)}"]
        return thought if self._format.is_thinking else f"({self._marker(THINK)} {thought})?"

    def _content(self, content: GrammarSpec | None, style: ToolStyle | None) -> str:
        if content is not None:
            self._parts["content"] = content.kind, content.text
            return "@content"
        first = r"[^\s{\[](?s:.*)" if style is not None and style.begins_text else "(?s:.+)"
        marker = f" & {_without(style.marker)}" if style is not None and style.marker else ""
        self._rules.append(f"TEXT: /{first}/{marker}{self._no_thought()}")
        return "TEXT?"

    def _calls(self, use: ToolUse, schemas: list[Mapping[str, Any]], style: ToolStyle, has_text_before: bool) -> str:
        names = [f"call{i}" for i in range(len(schemas))]
        for name, tool, schema in zip(names, use.tools, schemas, strict=True):
            self._rules.append(f"{name}: {self._call(name, tool.name, schema, style)}")
        self._rules += [f"call: {' | '.join(names)}", "ws: WS?", f"WS: /{WHITESPACE}/"]
        # An answer that begins with a call has no marker: what is a beginning needs none.
        marker = self._marker(style.marker) if style.marker and not style.begins_text else ""
        opening = self._text_until("TEXT", style.marker) if has_text_before else marker
        next_marker = "" if style.is_list else marker
        separator = json.dumps(style.separator) if style.separator else ""
        calls = "call" if use.is_single or style.is_single else f"call ({separator} {next_marker} call)*"
        return f'{opening} " "? "[" {calls} "]"' if style.is_list else f"{opening} {calls}"

    def _call(self, part: str, name: str, schema: Mapping[str, Any], style: ToolStyle) -> str:
        """What follows the marker."""
        self._parts[part] = GrammarKind.JSON_SCHEMA, json.dumps(schema)
        if style.is_named:
            return f"{json.dumps(name)} {self._marker(ARGUMENTS_MARKER)} @{part}"
        # The schema stays a grammar of its own: inside of another one its references would lead elsewhere.
        head = ("{", '"name"', ":", json.dumps(name), ",", f'"{style.arguments_key}"', ":")
        call = " ws ".join([*map(json.dumps, head), f"@{part}", json.dumps("}")])
        return f'"\\n" {call} "\\n" {self._marker(style.end)}' if style.end else call

    def _marker(self, text: str) -> str:
        token_id = self._special_tokens.get(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    def _no_thought(self) -> str:
        """Of a terminal: what begins with reasoning is that, and no text."""
        can_begin = self._format.has_reasoning and not self._format.is_thinking
        return rf" & ~/\s*{_escaped(THINK)}(?s:.*)/" if can_begin else ""

    def _text_until(self, terminal: str, text: str) -> str:
        """A terminal, that does not contain this text, and then the text. A lexer takes the longest match, so where the
        text is no token of its own, both are one terminal."""
        if text in self._special_tokens:
            return f"{terminal}? {self._marker(text)}"
        end = f"{terminal}_END: /(?s:.*){_escaped(text)}/ & ~/(?s:.*){_escaped(text)}(?s:.+)/"
        self._rules.append(end + (self._no_thought() if terminal == "TEXT" else ""))
        return f"{terminal}_END"


def _without(text: str) -> str:
    """A terminal: what does not contain this text, which a model could also write without its special token."""
    return f"~/(?s:.*){_escaped(text)}(?s:.*)/"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")
