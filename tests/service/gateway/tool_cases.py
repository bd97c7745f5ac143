"""What tests of tools share: tools, conversations with calls, models of every style, and how an answer is read."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import templates

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.gateway.answer_parser import Answer
from nibble.service.gateway.chat_template import ChatTemplate
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.served_model import ServedModel

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"enum": ["Rome", "<tool_call>"]}},
}
SCHEMAS = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
STRICT, LOOSE = (
    [
        {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": is_strict}},
        {"type": "function", "function": {"name": "now"}},
    ]
    for is_strict in (True, False)
)
SHORT = [{"type": "function", "function": {"name": name}} for name in SCHEMAS]
ROOM = 4096  # tokens: declarations are long for a tokenizer that knows few words
NAMED = {"type": "function", "function": {"name": "now"}}
UNENFORCEABLE = {"type": "function", "function": {"name": "tag", "parameters": {"properties": {"a": {"not": {}}}}}}
MARKERS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]
ALL = {
    "qwen3": templates.QWEN3,
    "hermes": templates.HERMES,
    "llama": templates.LLAMA3,
    "mistral": templates.MISTRAL,
    "mistral named": templates.MISTRAL_NAMED,
    "deepseek": templates.DEEPSEEK,
}


def with_template(model: ServedModel, template: str, **options: Any) -> ServedModel:
    return dataclasses.replace(model, chat_template=ChatTemplate(template, {}), **options)


def call(name: str = "get_weather", arguments: str = '{"city": "Rome"}', call_id: str = "123456789") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call()]},
    {"role": "tool", "tool_call_id": "123456789", "content": "sunny"},
]


def read(made: Plan, model: ServedModel, token_ids: list[int], cuts: list[int], reason: FinishReason) -> Any:
    """What a client is told of these tokens, in events that end at the cuts."""
    choice = Choice(made, model.make_detokenizer(made.skip_special_tokens, made.shown_tokens))
    answer = Answer()
    bounds = [0, *sorted(min(cut, len(token_ids)) for cut in cuts), len(token_ids)]
    for number, (start, end) in enumerate(pairwise(bounds), 2):
        finish_reason = reason if number == len(bounds) else None
        choice.push(
            TokenEvent(request_id="x", index=start, token_ids=token_ids[start:end], finish_reason=finish_reason)
        )
        assert choice.parser is not None
        answer.add(*choice.parser.take())
        if choice.finish_reason is not None:
            break
    calls = [(made.name, made.arguments) for made in answer.calls]
    return answer.reasoning, answer.content, calls, choice.told_reason, choice.num_tokens, choice.num_reasoning_tokens
