"""One request for plain text (`/v1/completions`) to the generation requests that answer it."""

from __future__ import annotations

import asyncio

from nibble.service.gateway.errors import InvalidRequest, model_not_found
from nibble.service.gateway.field_support import check_supported, ignored_fields
from nibble.service.gateway.plan import ClientContext, Plan, make_plan
from nibble.service.gateway.sampling import Wishes, too_long
from nibble.service.gateway.schema.sampling import MAX_CHOICES
from nibble.service.gateway.schema.text import CompletionRequest
from nibble.service.gateway.served_model import ServedModel

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_INLINE_CHARS = 2_000  # takes about a millisecond to encode; a longer prompt goes to a thread


async def to_text_plan(request: CompletionRequest, model: ServedModel, client: ClientContext) -> Plan:
    """Raises InvalidRequest, ContextLengthExceeded or NotFound (another model)."""
    if request.model != model.name:
        raise model_not_found(request.model)
    check_supported(request)
    num_choices = request.n or 1
    if request.best_of not in (None, num_choices):
        raise InvalidRequest("best_of is only supported where it equals n", param="best_of")
    prompts = await _prompts(request, model)
    if len(prompts) * num_choices > MAX_CHOICES:
        message = f"{len(prompts)} prompts with {num_choices} choices each, the limit is {MAX_CHOICES} choices"
        raise InvalidRequest(message, param="n")
    only_prompt = request.max_tokens == 0  # an engine has to draw one token, which nobody is told of
    wishes = Wishes(
        max_tokens=1 if only_prompt else request.max_tokens,
        default_max_tokens=_DEFAULT_MAX_TOKENS,
        num_logprobs=request.logprobs,
        ignored=ignored_fields(request),
        users=(request.user,),
        prompt_field="prompt",
        echoes=bool(request.echo),
        continues_prompt=True,
        only_prompt=only_prompt,
        grammar=await model.grammars.grammar_of(request),
    )
    plan = make_plan(request, model, client, prompts, wishes)
    await model.grammars.check_beginning(plan.requests[0])
    return plan


async def _prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Token ids of each; texts begin with what the tokenizer begins a text with."""
    given = request.prompt
    prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    token_ids = []
    for i, prompt in enumerate(prompts):
        adds_special_tokens = request.add_special_tokens is not False
        ids = await encode(prompt, model, adds_special_tokens) if isinstance(prompt, str) else list(prompt)
        field = "prompt" if len(prompts) == 1 else f"prompt[{i}]"
        if not ids:
            raise InvalidRequest(f"{field}: should not be empty", param="prompt")
        if any(token_id >= model.vocab_size for token_id in ids):
            message = f"{field}: token id {max(ids)} is outside the vocabulary of {model.vocab_size}"
            raise InvalidRequest(message, param="prompt")
        if len(ids) >= model.context_length:
            what = f"the prompt has {len(ids)} tokens and the completion needs at least 1"
            raise too_long(what, model.context_length, "prompt")
        token_ids.append(ids)
    return token_ids


async def encode(prompt: str, model: ServedModel, adds_special_tokens: bool) -> list[int]:
    """Raises ContextLengthExceeded for a text that need not even be encoded; others may be too long too."""
    bound = model.max_bytes_per_token
    if bound is not None and len(prompt) > model.context_length * bound:  # certainly too long: don't encode it
        raise too_long(f"the prompt has more than {len(prompt) // bound} tokens", model.context_length, "prompt")
    if len(prompt) <= _INLINE_CHARS:
        return model.encode(prompt, add_special_tokens=adds_special_tokens)
    return await asyncio.to_thread(model.encode, prompt, add_special_tokens=adds_special_tokens)
