"""One chat request to the generation requests that answer it. All validation that needs the model is here.

The prompt is rendered and tokenised in a thread when it is long: neither may hold up the streams of other clients.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.service.gateway.chat_template import RESERVED_VARIABLES, ChatTemplate, ChatTemplateError
from nibble.service.gateway.errors import ContextLengthExceeded, InvalidRequest, model_not_found, shown
from nibble.service.gateway.field_support import check_supported, ignored_fields
from nibble.service.gateway.schema.chat import ChatCompletionRequest, Message, ToolCall
from nibble.service.gateway.served_model import ServedModel

# A prompt of this many characters takes about a millisecond to encode; a longer one goes to a thread.
_INLINE_CHARS = 2_000
_SEED_BITS = 64

# service_tier -> (priority, the tier that the response names). A lower number is served first.
_TIERS = {
    "auto": (0, "default"),
    "default": (0, "default"),
    "standard": (0, "default"),
    "flex": (10, "flex"),
    "scale": (-10, "scale"),
    "priority": (-10, "priority"),
}


@dataclass(frozen=True)
class ClientContext:
    """What the HTTP request says beside its body. All times are Unix times in seconds."""

    request_id: str
    arrival_s: float
    deadline_s: float | None = None
    first_token_by_s: float | None = None
    tenant: str = ""  # of the API key
    default_max_tokens: int | None = None
    cache_scope: str = ""  # requests of different scopes share nothing in the prefix cache


@dataclass(frozen=True)
class ChatPlan:
    """A valid chat request: one generation request per choice, and how their tokens become an answer."""

    request_id: str
    arrival_s: float
    first_token_by_s: float | None
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    service_tier: str
    ignored: tuple[str, ...]


async def to_generation_requests(request: ChatCompletionRequest, model: ServedModel, client: ClientContext) -> ChatPlan:
    """Raises InvalidRequest, ContextLengthExceeded or NotFound (another model)."""
    if request.model != model.name:
        raise model_not_found(request.model)
    check_supported(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true", param="stream_options")
    prompt_token_ids = await _prompt_token_ids(request, model)
    sampling = _sampling(request, model, len(prompt_token_ids), client.default_max_tokens)
    priority, service_tier = _TIERS[request.service_tier or "auto"]
    requests = tuple(
        GenerationRequest(
            request_id=choice_request_id(client.request_id, choice),
            prompt_token_ids=prompt_token_ids,
            sampling=choice_sampling,
            arrival_s=client.arrival_s,
            deadline_s=client.deadline_s,
            priority=priority + (request.priority or 0),
            tenant=_tenant(request, client),
            cache_salt=_cache_salt(request, client),
        )
        for choice, choice_sampling in enumerate(_per_choice(sampling, request.n or 1))
    )
    return ChatPlan(
        request_id=client.request_id,
        arrival_s=client.arrival_s,
        first_token_by_s=client.first_token_by_s,
        requests=requests,
        prompt_tokens=len(prompt_token_ids),
        stops=_stops(request),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        service_tier=service_tier,
        ignored=ignored_fields(request),
    )


def choice_request_id(request_id: str, choice: int) -> str:
    """The engine's name of one choice; the first has the name that the client sees."""
    return f"{request_id}.{choice}" if choice else request_id


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
        raise _too_long(f"the prompt has more than {at_least} tokens", limit)
    token_ids = model.encode(text)
    if not token_ids:
        raise InvalidRequest("the messages render to an empty prompt", param="messages")
    if len(token_ids) >= limit:
        raise _too_long(f"the prompt has {len(token_ids)} tokens and the completion needs at least 1", limit)
    return token_ids


def _too_long(what: str, limit: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"the context length of this model is {limit} tokens, but {what}", param="messages")


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


def _sampling(
    request: ChatCompletionRequest, model: ServedModel, num_prompt_tokens: int, default_max_tokens: int | None
) -> SamplingParams:
    room = model.context_length - num_prompt_tokens
    max_tokens = _requested_max_tokens(request)
    if max_tokens is None:
        max_tokens = min(room, default_max_tokens or room)
    elif max_tokens > room:
        asked = num_prompt_tokens + max_tokens
        what = f"{asked} were requested ({num_prompt_tokens} in the messages, {max_tokens} in the completion)"
        raise _too_long(what, model.context_length)
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens is {min_tokens}, more than max_tokens {max_tokens}", param="min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),  # -1 is the other spelling of "off"
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed % 2**_SEED_BITS,
        min_tokens=min_tokens,
        stop_token_ids=_stop_token_ids(request, model),
    )


def _requested_max_tokens(request: ChatCompletionRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; set one of them"
        raise InvalidRequest(message, param="max_tokens")
    return old if new is None else new


def _stop_token_ids(request: ChatCompletionRequest, model: ServedModel) -> tuple[int, ...]:
    asked = request.stop_token_ids or []
    for i, token_id in enumerate(asked):
        if token_id >= model.vocab_size:
            message = f"stop_token_ids[{i}] is {token_id}, the vocabulary has {model.vocab_size} tokens"
            raise InvalidRequest(message, param="stop_token_ids")
    ends = frozenset() if request.ignore_eos else model.eos_token_ids
    return tuple(sorted(ends.union(asked)))


def _stops(request: ChatCompletionRequest) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _per_choice(sampling: SamplingParams, n: int) -> list[SamplingParams]:
    """Choice 0 has the request's seed; the others draw from keys derived from it."""
    return [msgspec.structs.replace(sampling, seed=_choice_seed(sampling.seed, choice)) for choice in range(n)]


def _choice_seed(seed: int, choice: int) -> int:
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little")


def _tenant(request: ChatCompletionRequest, client: ClientContext) -> str:
    user = request.safety_identifier or request.user or request.prompt_cache_key or ""
    return f"{client.tenant}:{user}" if client.tenant and user else client.tenant or user


def _cache_salt(request: ChatCompletionRequest, client: ClientContext) -> str:
    """No scope has a slash, so different pairs are different salts."""
    return f"{client.cache_scope}/{request.cache_salt or ''}" if client.cache_scope or request.cache_salt else ""
