"""What the sampling parameters of a request leave of the tokens that may come next.

A grammar and bans are the client's, and can contradict each other: a gateway refuses what does from the first token on,
an engine tells a request that came to such an end from a model whose logits are not finite. numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nibble.engine.protocol import SamplingParams

Tokens = npt.NDArray[np.bool_]  # whether each token of the vocabulary is one of them


def has_bans(sampling: SamplingParams) -> bool:
    """Whether any token may be forbidden at some time."""
    return (
        sampling.allowed_token_ids is not None
        or bool(sampling.bad_words_token_ids)
        or bool(sampling.min_tokens and sampling.stop_token_ids)
        or any(bias == -math.inf for _, bias in sampling.logit_bias)
    )


def exhausting_fields(sampling: SamplingParams, generated: Sequence[int], allowed: Tokens) -> tuple[str, ...]:
    """The fields of SamplingParams that together forbid all that is allowed to follow the generated tokens.

    Those alone that forbid some of it; none if something is left.
    """
    bans = dict(_bans(sampling, generated, len(allowed)))
    left = allowed.copy()
    for banned in bans.values():
        left &= ~banned
    return () if left.any() else tuple(field for field, banned in bans.items() if (allowed & banned).any())


def _bans(sampling: SamplingParams, generated: Sequence[int], vocab_size: int) -> Iterator[tuple[str, Tokens]]:
    """The order of fields is that of docs/api.md."""
    if sampling.allowed_token_ids is not None:
        yield "allowed_token_ids", ~_tokens(sampling.allowed_token_ids, vocab_size)
    ends = [word[-1] for word in sampling.bad_words_token_ids if _ends_with(generated, word[:-1])]
    if ends:
        yield "bad_words_token_ids", _tokens(ends, vocab_size)
    if sampling.stop_token_ids and len(generated) < sampling.min_tokens:
        yield "min_tokens", _tokens(sampling.stop_token_ids, vocab_size)
    forbidden = [token_id for token_id, bias in sampling.logit_bias if bias == -math.inf]
    if forbidden:
        yield "logit_bias", _tokens(forbidden, vocab_size)


def _ends_with(generated: Sequence[int], tail: Sequence[int]) -> bool:
    return list(generated[len(generated) - len(tail) :]) == list(tail)


def _tokens(token_ids: Sequence[int], vocab_size: int) -> Tokens:
    tokens = np.zeros(vocab_size, np.bool_)
    tokens[np.asarray(token_ids, np.int64)] = True
    return tokens
