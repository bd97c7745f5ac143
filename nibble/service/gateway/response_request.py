"""A request for a response as a request for a chat: the same prompts, the same validation, the same plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson
from pydantic import ValidationError

from nibble.service.gateway.chat import to_generation_requests
from nibble.service.gateway.errors import InvalidRequest, from_validation, shown
from nibble.service.gateway.field_support import set_extras
from nibble.service.gateway.plan import ClientContext, Plan
from nibble.service.gateway.response_items import to_messages, with_ids
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.responses import Item, ResponseRequest
from nibble.service.gateway.served_model import ServedModel

_LOGPROBS = "message.output_text.logprobs"
# Where a chat's validation names a field of its own, the one that it was made of; longer names first.
_NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
    ("verbosity", "text.verbosity"),
    ("messages", "input"),
)
# As in field_support.py; what becomes a field of a chat is rejected or reported as that one is.
REJECTED: Mapping[str, Callable[[Any], bool]] = {
    "background": lambda value: not value,
    "conversation": lambda value: not value,
    "moderation": lambda value: not value,
    "prompt": lambda value: not value,
    "truncation": lambda value: value == "disabled",  # nothing of a prompt is ever left out
}
REPORTED = (
    "max_tool_calls",
    "prompt_cache_retention",
    "prompt_cache_options",
    "context_management",
    "background_options",
    "image",
    "access_programs",
)


async def to_response_plan(
    request: ResponseRequest, history: Sequence[dict[str, Any]], model: ServedModel, client: ClientContext
) -> Plan:
    """`history`: items of the responses before, oldest first. Raises InvalidRequest and what a chat may raise."""
    _check_supported(request)
    items = request.input if not isinstance(request.input, str) else [Item(role="user", content=request.input)]
    earlier = [Item.model_validate(item) for item in history]
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []
    messages = [*system, *to_messages(earlier, "previous_response_id"), *to_messages(items, "input")]
    try:
        chat = ChatCompletionRequest.model_validate(_chat_fields(request, messages))
        plan = await to_generation_requests(chat, model, client)
    except ValidationError as error:
        raise _renamed(from_validation(error)) from error
    except InvalidRequest as error:
        raise _renamed(error) from error
    response = _skeleton(request, plan, model)
    kept = orjson.dumps({"response": response, "input": with_ids(request.input), "store": response["store"]})
    ignored = (*map(_response_name, plan.ignored), *_ignored(request))
    return replace(plan, stream=bool(request.stream), ignored=ignored, response=kept)


def _check_supported(request: ResponseRequest) -> None:
    for field, is_neutral in REJECTED.items():
        value = getattr(request, field)
        if value is not None and not is_neutral(value):
            message = f"{field} is not supported (got {shown(value)})"
            raise InvalidRequest(message, param=field, code="unsupported_parameter")


def _chat_fields(request: ResponseRequest, messages: list[dict[str, Any]]) -> dict[str, Any]:
    wants_logprobs = _LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    text, reasoning = request.text, request.reasoning
    return {
        "model": request.model,
        "messages": messages,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_completion_tokens": request.max_output_tokens,
        "response_format": _response_format(request),
        "verbosity": text.verbosity if text else None,
        "logprobs": wants_logprobs or None,
        "top_logprobs": request.top_logprobs if wants_logprobs else None,
        "reasoning_effort": reasoning.effort if reasoning else None,
        "tools": [_chat_tool(tool) for tool in request.tools] if request.tools else None,
        "tool_choice": _chat_tool_choice(request.tool_choice) if request.tools else None,
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "service_tier": request.service_tier,
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _response_format(request: ResponseRequest) -> dict[str, Any] | None:
    wanted = request.text.format if request.text else None
    if wanted is None:
        return None
    fields = wanted.model_dump(by_alias=True, exclude_none=True)
    kind = fields.pop("type")
    return {"type": kind, "json_schema": fields} if kind == "json_schema" else {"type": kind, **fields}


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function's fields are inside; other tools are left as they are, and refused."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return _reference(choice)
    if choice.get("type") == "allowed_tools":
        tools = [_reference(tool) if isinstance(tool, dict) else tool for tool in choice.get("tools") or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def _reference(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": tool.get("type"), "function": {"name": tool.get("name")}}


def _skeleton(request: ResponseRequest, plan: Plan, model: ServedModel) -> dict[str, Any]:
    """The response without what is generated."""
    sampling = plan.requests[0].sampling
    given = request.model_dump(by_alias=True, exclude_none=True)
    text = {"format": {"type": "text"}, **given.get("text", {})}
    return {
        "id": plan.request_id,
        "object": "response",
        "created_at": int(plan.arrival_s),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "frequency_penalty": sampling.frequency_penalty,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": model.name,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
        "safety_identifier": request.safety_identifier,
        "service_tier": plan.service_tier,
        "store": request.store is not False,
        "temperature": sampling.temperature,
        "text": text,
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [_told_tool(tool) for tool in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "metadata": request.metadata or {},
        **({"user": request.user} if request.user else {}),
    }


def _told_tool(tool: dict[str, Any]) -> dict[str, Any]:
    defaults = {"description": None, "parameters": None, "strict": False}
    return {**defaults, **tool} if tool.get("type") == "function" else tool


def _ignored(request: ResponseRequest) -> list[str]:
    known = [field for field in REPORTED if getattr(request, field)]
    included = [f"include.{name}" for name in request.include or () if name != _LOGPROBS]
    nested = []
    for field in ("text", "reasoning", "stream_options"):
        if (value := getattr(request, field)) is not None:
            nested += [f"{field}.{name}" for name in set_extras(value.model_extra)]
    if request.reasoning is not None and request.reasoning.summary:
        nested.append("reasoning.summary")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        nested.append("stream_options.include_obfuscation")
    return [*known, *included, *nested, *set_extras(request.model_extra)]


def _response_name(name: str) -> str:
    for chat_name, response_name in _NAMES:
        if name.startswith(chat_name):
            return response_name + name.removeprefix(chat_name)
    return name.replace(".function", "", 1) if name.startswith("tools[") else name


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """The error of a chat, in the words of this endpoint."""
    message = error.message
    for chat_name, response_name in _NAMES:
        if error.param is not None and error.param.startswith(chat_name):
            message = message.replace(chat_name, response_name)
    if error.param is not None and error.param.startswith("tools["):
        message = message.replace(".function", "", 1)
    return type(error)(message, param=_response_name(error.param) if error.param else None, code=error.code)
