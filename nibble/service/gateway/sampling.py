"""How the tokens of a request are drawn: the fields of its body, checked, as SamplingParams."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from nibble.engine.protocol import GrammarSpec, InvalidSampling, SamplingParams, check_sampling
from nibble.service.gateway.answer_parser import AnswerFormat
from nibble.service.gateway.errors import ContextLengthExceeded, InvalidRequest, invalid_sampling
from nibble.service.gateway.schema.sampling import MAX_BIAS, SamplingBody
from nibble.service.gateway.served_model import ServedModel

_SEED_BITS = 64


@dataclass(frozen=True)
class Wishes:
    """What endpoints ask for in fields of their own."""

    max_tokens: int | None
    default_max_tokens: int | None
    num_logprobs: int | None
    ignored: tuple[str, ...]
    users: tuple[str | None, ...]  # the first one counts
    prompt_field: str  # for errors
    echoes: bool = False
    continues_prompt: bool = False
    only_prompt: bool = False
    grammar: GrammarSpec | None = None
    format: AnswerFormat | None = None


def sampling_params(
    request: SamplingBody, model: ServedModel, num_prompt_tokens: int, wishes: Wishes
) -> SamplingParams:
    """Raises InvalidRequest, ContextLengthExceeded."""
    ends = frozenset[int]() if request.ignore_eos else model.eos_token_ids
    sampling = SamplingParams(
        max_tokens=_max_tokens(model, num_prompt_tokens, wishes),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),  # -1 is the other spelling of "off"
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=secrets.randbits(_SEED_BITS) if request.seed is None else request.seed % 2**_SEED_BITS,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=tuple(sorted(ends.union(request.stop_token_ids or ()))),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias or {}),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words_token_ids=tuple(_bad_words(request.bad_words or (), model)),
        logprobs=wishes.num_logprobs,
        prompt_logprobs=wishes.num_logprobs if wishes.echoes else None,
    )
    try:
        check_sampling(sampling, model.vocab_size)
    except InvalidSampling as error:
        raise invalid_sampling(error) from error
    return sampling


def too_long(what: str, limit: int, field: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(f"the context length of this model is {limit} tokens, but {what}", param=field)


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's seed; the others draw from keys derived from it."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little")


def _max_tokens(model: ServedModel, num_prompt_tokens: int, wishes: Wishes) -> int:
    room, max_tokens = model.context_length - num_prompt_tokens, wishes.max_tokens
    if max_tokens is None:
        return min(room, wishes.default_max_tokens or room)
    if max_tokens > room:
        asked = num_prompt_tokens + max_tokens
        what = (
            f"{asked} were requested ({num_prompt_tokens} in the {wishes.prompt_field}, {max_tokens} in the completion)"
        )
        raise too_long(what, model.context_length, wishes.prompt_field)
    return max_tokens


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """The lowest bias is a ban, as OpenAI describes it."""
    pairs = {}
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit()):
            raise InvalidRequest('logit_bias: keys should be token ids, such as "42"', param="logit_bias")
        pairs[int(name[:20])] = -math.inf if bias == -MAX_BIAS else bias
    return tuple(pairs.items())


def _bad_words(words: Iterable[str], model: ServedModel) -> Iterable[tuple[int, ...]]:
    """Each as it is at the beginning of a text and, where that makes other tokens, after a space; as vLLM does."""
    for i, word in enumerate(words):
        bare = word.lstrip()
        if not bare:
            raise InvalidRequest(f"bad_words[{i}]: should have more than spaces", param="bad_words")
        first, spaced = tuple(model.encode(bare)), tuple(model.encode(f" {bare}"))
        yield first
        if spaced[0] != first[0] and len(spaced) == len(first):
            yield spaced
