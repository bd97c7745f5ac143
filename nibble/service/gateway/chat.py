"""One chat request to the generation requests that answer it. All validation that needs the model is here.

The prompt is rendered and tokenised in a thread when it is long: neither may hold up the streams of other clients.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nibble.service.gateway.chat_template import RESERVED_VARIABLES, ChatTemplate, ChatTemplateError
from nibble.service.gateway.errors import InvalidRequest, model_not_found, shown
from nibble.service.gateway.field_support import check_supported, ignored_fields
from nibble.service.gateway.plan import ClientContext, Plan, make_plan
from nibble.service.gateway.sampling import Wishes, too_long
from nibble.service.gateway.schema.chat import ChatCompletionRequest, Message, ToolCall
from nibble.service.gateway.served_model import ServedModel

# A prompt of this many characters takes about a millisecond to encode; a longer one goes to a thread.
_INLINE_CHARS = 2_000


async def to_generation_requests(request: ChatCompletionRequest, model: ServedModel, client: ClientContext) -> Plan:
    """Raises InvalidRequest, ContextLengthExceeded or NotFound (another model)."""
    if request.model != model.name:
        raise model_not_found(request.model)
    check_supported(request)
    prompt_token_ids = await _prompt_token_ids(request, model)
    wants_logprobs = bool(request.logprobs)
    if request.top_logprobs and not wants_logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    return make_plan(
        request,
        model,
        client,
        [prompt_token_ids],
        Wishes(
            max_tokens=_requested_max_tokens(request),
            default_max_tokens=client.default_max_tokens,
            num_logprobs=request.top_logprobs or 0 if wants_logprobs else None,
            ignored=ignored_fields(request),
            users=(request.safety_identifier, request.user, request.prompt_cache_key),
            prompt_field="messages",
            grammar=await model.grammars.grammar_of(request),
        ),
    )


def _requested_max_tokens(request: ChatCompletionRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; set one of them"
        raise InvalidRequest(message, param="max_tokens")
    return old if new is None else new


async def _prompt_token_ids(request: ChatCompletionRequest, model: ServedModel) -> list[int]:
    messages = [_template_message(message, f"messages[{i}]", model) for i, message in enumerate(request.messages)]
    num_chars = sum(_num_chars(message) for message in request.messages)
    if num_chars <= _INLINE_CHARS:
        return _render_and_encode(request, messages, model)
    return await asyncio.to_thread(_render_and_encode, request, messages, model)


def _num_chars(message: Message) -> int:
    texts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content or ()]
    arguments = [call.function.arguments for call in message.tool_calls or ()]
    return sum(len(text) for text in [*texts, *arguments] if text)


def _render_and_encode(
    request: ChatCompletionRequest, messages: Sequence[Mapping[str, Any]], model: ServedModel
) -> list[int]:
    text = _render(request, messages, _template(model))
    limit = model.context_length
    bound = model.max_bytes_per_token
    if bound is not None and len(text) > limit * bound:  # bytes >= characters: certainly too long, don't encode it
        at_least = len(text) // bound
        raise too_long(f"the prompt has more than {at_least} tokens", limit, "messages")
    token_ids = model.encode(text)
    if not token_ids:
        raise InvalidRequest("the messages render to an empty prompt", param="messages")
    if len(token_ids) >= limit:
        raise too_long(f"the prompt has {len(token_ids)} tokens and the completion needs at least 1", limit, "messages")
    return token_ids


def _template(model: ServedModel) -> ChatTemplate:
    if model.chat_template is None:
        raise InvalidRequest(f"the model {model.name} has no chat template", code="no_chat_template")
    return model.chat_template


def _render(request: ChatCompletionRequest, messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> str:
    variables = request.chat_template_kwargs or {}
    if reserved := RESERVED_VARIABLES & variables.keys():
        name = f"chat_template_kwargs.{min(reserved)}"
        raise InvalidRequest(f"{name}: this variable is set by the request itself", param=name)
    is_continuing = bool(request.continue_final_message)
    if is_continuing and request.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true"
        raise InvalidRequest(message, param="continue_final_message")
    try:
        return template.render(
            messages,
            add_generation_prompt=not is_continuing and request.add_generation_prompt is not False,
            continue_final_message=is_continuing,
            variables=variables,
        )
    except ChatTemplateError as error:
        raise InvalidRequest(str(error), param="messages", code="chat_template_error") from error


def _template_message(message: Message, path: str, model: ServedModel) -> dict[str, Any]:
    """The message as templates expect it: text content, tool arguments as objects, a role that the template knows."""
    for field in ("audio", "function_call"):
        if getattr(message, field) is not None:
            raise InvalidRequest(f"{path}.{field} is not supported yet", param=f"{path}.{field}")
    values = message.model_dump(exclude_none=True)
    values["content"] = _text_content(message, path)
    if message.role == "developer" and not _template(model).mentions("developer"):
        values["role"] = "system"
    if message.tool_calls:
        values["tool_calls"] = [
            _template_tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return values


def _text_content(message: Message, path: str) -> str:
    """Text parts are joined with a line break, as other servers do for templates that take text alone."""
    if message.content is None:
        if message.role == "assistant" and (message.tool_calls or message.refusal):
            return ""
        raise InvalidRequest(f"{path}.content: field required for role {message.role}", param=f"{path}.content")
    if isinstance(message.content, str):
        return message.content
    texts = []
    for i, part in enumerate(message.content):
        where = f"{path}.content[{i}]"
        if part.type != "text":
            raise InvalidRequest(f"{where}: content of type {shown(part.type)} is not supported yet", param=where)
        if part.text is None:
            raise InvalidRequest(f"{where}.text: field required", param=f"{where}.text")
        texts.append(part.text)
    return "\n".join(texts)


def _template_tool_call(call: ToolCall, path: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        where = f"{path}.function.arguments"
        raise InvalidRequest(f"{where}: should be JSON: {error}", param=where) from error
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
