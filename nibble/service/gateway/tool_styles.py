"""How a model writes tool calls and reasoning: the styles that are known, and which of them a chat template is of.

A call is a JSON object with a name and arguments, in all styles but the later one of Mistral. They differ in what
announces it:

    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call>      Hermes, Qwen 2.5 and 3
    llama    {"name": ..., "parameters": {...}}                            Llama 3.1 to 3.3
    mistral  [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]          or [TOOL_CALLS]name[ARGS]{...}
    generic  {"name": ..., "arguments": {...}}, one on each line           any other

Where nothing announces it, an answer that begins with such an object is one. Reasoning is what stands between <think>
and </think> before the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

THINK, END_THINK = "<think>", "</think>"
LIST_MARKER, ARGUMENTS_MARKER, ID_MARKER = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


@dataclass(frozen=True)
class ToolStyle:
    """marker: announces calls wherever it stands. begins_text: a call can be the beginning of an answer, without one.
    end: closes one call. arguments_key: what the model was taught; others are read too. is_list: the calls after a
    marker are a JSON list. is_named: a call is `name[ARGS]{...}`. separator: between calls.
    is_single: the template refuses answers of several calls.
    """

    name: str
    marker: str = ""
    begins_text: bool = False
    end: str = ""
    arguments_key: str = "arguments"
    is_list: bool = False
    is_named: bool = False
    separator: str = "\n"
    is_single: bool = False

    @property
    def markers(self) -> frozenset[str]:
        """Texts that a parser has to see, special tokens though they may be."""
        own = {self.marker, self.end} | ({ARGUMENTS_MARKER, ID_MARKER} if self.marker == LIST_MARKER else set())
        return frozenset(own - {""})


HERMES = ToolStyle("hermes", marker="<tool_call>", end="</tool_call>")
LLAMA = ToolStyle("llama", marker="<|python_tag|>", begins_text=True, arguments_key="parameters", separator="; ")
MISTRAL = ToolStyle("mistral", marker=LIST_MARKER, is_list=True, separator=", ")
MISTRAL_NAMED = ToolStyle("mistral", marker=LIST_MARKER, is_named=True, separator="")
GENERIC = ToolStyle("generic", begins_text=True)


class ToolCallParserName(StrEnum):
    """What a deployment can choose."""

    AUTO = "auto"
    HERMES = "hermes"
    LLAMA = "llama"
    MISTRAL = "mistral"
    GENERIC = "generic"


class ReasoningParserName(StrEnum):
    """What a deployment can choose. none: what a model thinks is part of its answer."""

    AUTO = "auto"
    THINK = "think"
    NONE = "none"


def tool_style(template: str, wanted: ToolCallParserName = ToolCallParserName.AUTO) -> ToolStyle:
    """That of a chat template (its source), unless another is wanted."""
    if wanted is ToolCallParserName.AUTO:
        wanted = _detected(template)
    match wanted:
        case ToolCallParserName.HERMES:
            return HERMES
        case ToolCallParserName.LLAMA:
            return replace(LLAMA, is_single="single tool-calls" in template)
        case ToolCallParserName.MISTRAL:
            return MISTRAL_NAMED if ARGUMENTS_MARKER in template else MISTRAL
        case _:
            return GENERIC


def has_reasoning(template: str, wanted: ReasoningParserName = ReasoningParserName.AUTO) -> bool:
    if wanted is ReasoningParserName.AUTO:
        return END_THINK in template
    return wanted is ReasoningParserName.THINK


def _detected(template: str) -> ToolCallParserName:
    if LIST_MARKER in template:
        return ToolCallParserName.MISTRAL
    if HERMES.marker in template:
        return ToolCallParserName.HERMES
    if LLAMA.marker in template or '"parameters": dictionary' in template:
        return ToolCallParserName.LLAMA
    return ToolCallParserName.GENERIC
