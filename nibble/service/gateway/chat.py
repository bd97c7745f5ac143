"""One chat request to the generation requests that answer it. All validation that needs the model is here.

The prompt is rendered and tokenised in a thread when it is long: neither may hold up the streams of other clients.
"""

from __future__ import annotations

import asyncio

from nibble.service.gateway.answer_grammar import answer_grammar
from nibble.service.gateway.answer_parser import AnswerFormat
from nibble.service.gateway.chat_prompt import ChatPrompt
from nibble.service.gateway.errors import InvalidRequest, model_not_found
from nibble.service.gateway.field_support import check_supported, ignored_fields
from nibble.service.gateway.plan import ClientContext, Plan, make_plan
from nibble.service.gateway.sampling import Wishes, too_long
from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.served_model import ServedModel
from nibble.service.gateway.tool_choice import ToolUse, tool_use
from nibble.service.gateway.tool_styles import END_THINK, THINK

# A prompt of this many characters takes about a millisecond to encode; a longer one goes to a thread.
_INLINE_CHARS = 2_000


async def to_generation_requests(request: ChatCompletionRequest, model: ServedModel, client: ClientContext) -> Plan:
    """Raises InvalidRequest, ContextLengthExceeded or NotFound (another model)."""
    if request.model != model.name:
        raise model_not_found(request.model)
    check_supported(request)
    wants_logprobs = bool(request.logprobs)
    if request.top_logprobs and not wants_logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    use = tool_use(request)
    prompt = ChatPrompt(request, model, use)
    text, token_ids = await _prompt(prompt, model)
    if len(token_ids) >= model.context_length:
        what = f"the prompt has {len(token_ids)} tokens and the completion needs at least 1"
        raise too_long(what, model.context_length, "messages")
    format = _answer_format(model, use, text, prompt.continued)
    content = await model.grammars.grammar_of(request)
    plan = make_plan(
        request,
        model,
        client,
        [token_ids],
        Wishes(
            max_tokens=_requested_max_tokens(request),
            default_max_tokens=client.default_max_tokens,
            num_logprobs=request.top_logprobs or 0 if wants_logprobs else None,
            ignored=(*prompt.ignored_fields, *ignored_fields(request)),
            users=(request.safety_identifier, request.user, request.prompt_cache_key),
            prompt_field="messages",
            grammar=await answer_grammar(model.grammars, use, format, content),
            format=format if format.has_reasoning or format.style else None,
        ),
    )
    await model.grammars.check_beginning(plan.requests[0])
    return plan


def _requested_max_tokens(request: ChatCompletionRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_tokens is {old} and max_completion_tokens is {new}; set one of them"
        raise InvalidRequest(message, param="max_tokens")
    return old if new is None else new


async def prompt_token_ids(request: ChatCompletionRequest, model: ServedModel) -> list[int]:
    """Raises InvalidRequest, or ContextLengthExceeded where it takes no encoding to tell; others may be too long."""
    check_supported(request)
    _, token_ids = await _prompt(ChatPrompt(request, model, tool_use(request)), model)
    return token_ids


async def _prompt(prompt: ChatPrompt, model: ServedModel) -> tuple[str, list[int]]:
    is_short = prompt.num_chars <= _INLINE_CHARS
    return _encoded(prompt, model) if is_short else await asyncio.to_thread(_encoded, prompt, model)


def _encoded(prompt: ChatPrompt, model: ServedModel) -> tuple[str, list[int]]:
    text = prompt.render()
    limit = model.context_length
    bound = model.max_bytes_per_token
    if bound is not None and len(text) > limit * bound:  # bytes >= characters: certainly too long, don't encode it
        at_least = len(text) // bound
        raise too_long(f"the prompt has more than {at_least} tokens", limit, "messages")
    token_ids = model.encode(text)
    if not token_ids:
        raise InvalidRequest("the messages render to an empty prompt", param="messages")
    return text, token_ids


def _answer_format(model: ServedModel, use: ToolUse | None, prompt: str, continued: str) -> AnswerFormat:
    """Templates open the reasoning, or close it where none is wanted; so does an answer that is continued."""
    can_reason = model.has_reasoning
    so_far = continued or prompt.rstrip()
    is_thinking = so_far.rfind(THINK) > so_far.rfind(END_THINK) if continued else so_far.endswith(THINK)
    is_over = bool(continued) or so_far.endswith(END_THINK)
    return AnswerFormat(
        has_reasoning=can_reason and (is_thinking or not is_over),
        is_thinking=can_reason and is_thinking,
        style=model.tool_style if use is not None else None,
        function_names=frozenset(tool.name for tool in use.tools) if use is not None else frozenset(),
    )
