"""SamplingParams as the engine uses them: checked, and as the content of a slot of the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

from nibble.engine.errors import RequestError
from nibble.engine.protocol import SamplingParams
from nibble.kernels.sampling import MAX_LOGPROBS
from nibble.kernels.slots import MAX_BAD_WORD_WORDS, MAX_BIASES, MAX_STOP_IDS, NUM_RECENT, SlotContent

MAX_BAD_WORD_TOKENS = NUM_RECENT + 1
WORD_BYTES = 4


def slot_content(sampling: SamplingParams) -> SlotContent | None:
    """What has to be in a slot for this request's logits; None if they stay as they are."""
    content = SlotContent(
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        min_tokens=sampling.min_tokens if sampling.stop_token_ids else 0,
        stop_ids=sampling.stop_token_ids if sampling.min_tokens else (),
        biases=sampling.logit_bias,
        bad_words=sampling.bad_words_token_ids,
        allowed=sampling.allowed_token_ids,
    )
    return None if content == SlotContent() else content


def record_bytes(num_logprobs: int) -> int:
    """Bytes of one token's record of log probabilities, see `TokenEvent`."""
    return (1 + 2 * num_logprobs) * WORD_BYTES


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError for what the device could not do, or what leaves no token to draw."""
    _check_numbers(sampling)
    words = sampling.bad_words_token_ids
    for what, count, limit in (
        ("stop token ids", len(sampling.stop_token_ids), MAX_STOP_IDS),
        ("logit biases", len(sampling.logit_bias), MAX_BIASES),
        ("tokens and ends of bad words", sum(len(word) + 1 for word in words), MAX_BAD_WORD_WORDS),
        ("tokens in a bad word", max((len(word) for word in words), default=0), MAX_BAD_WORD_TOKENS),
    ):
        if count > limit:
            raise RequestError(f"request has {count} {what}, the limit is {limit}")
    biased = [token_id for token_id, _ in sampling.logit_bias]
    if len(set(biased)) < len(biased):
        raise RequestError("logit_bias names a token id twice")
    if not all(words):
        raise RequestError("bad_words_token_ids has an empty word")
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("logit_bias", biased, vocab_size)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids or (), vocab_size)
    _check_ids("bad_words_token_ids", (token_id for word in words for token_id in word), vocab_size)
    _check_something_is_left(sampling, vocab_size)


def _check_numbers(sampling: SamplingParams) -> None:
    for name in ("frequency_penalty", "presence_penalty", "repetition_penalty"):
        value = getattr(sampling, name)
        if not math.isfinite(value):
            raise RequestError(f"{name} is {value}, it must be finite")
    if sampling.repetition_penalty <= 0:
        raise RequestError(f"repetition_penalty is {sampling.repetition_penalty}, it must be above 0")
    for token_id, bias in sampling.logit_bias:
        if math.isnan(bias) or bias == math.inf:
            raise RequestError(f"logit_bias of token id {token_id} is {bias}, it must be finite or -inf")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, name)
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise RequestError(f"{name} is {count}, the limits are 0 and {MAX_LOGPROBS}")


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise RequestError(f"{name} has token id {bad}, outside the vocabulary of {vocab_size}")


def _check_something_is_left(sampling: SamplingParams, vocab_size: int) -> None:
    forbidden = {token_id for token_id, bias in sampling.logit_bias if bias == -math.inf}
    forbidden.update(word[0] for word in sampling.bad_words_token_ids if len(word) == 1)
    if sampling.min_tokens:
        forbidden.update(sampling.stop_token_ids)
    if sampling.allowed_token_ids is None:
        is_left = len(forbidden) < vocab_size
    else:
        is_left = not forbidden.issuperset(sampling.allowed_token_ids)
    if not is_left:
        raise RequestError(
            "all tokens are forbidden: allowed_token_ids, logit_bias, bad words or min_tokens leave none"
        )
