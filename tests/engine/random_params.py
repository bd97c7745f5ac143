"""Sampling parameters whose state is on the device, drawn at random for tests of batching and recovery."""

from __future__ import annotations

from typing import Any

import numpy as np


def stop_ids(rng: np.random.Generator, vocab_size: int) -> tuple[int, ...]:
    """None, or a few."""
    return tuple(int(token_id) for token_id in rng.integers(0, vocab_size, rng.choice([0, 4])))


def adjustments(rng: np.random.Generator, vocab_size: int, max_tokens: int) -> dict[str, Any]:
    """One or several fields of SamplingParams."""
    allowed = tuple(rng.permutation(vocab_size)[:40].tolist())
    choices: list[dict[str, Any]] = [
        {"frequency_penalty": 0.8, "presence_penalty": -0.3},
        {"repetition_penalty": 1.4},
        {"logit_bias": tuple((int(i), 3.0) for i in rng.permutation(vocab_size)[:9])},
        {"allowed_token_ids": allowed},
        {"bad_words_token_ids": tuple((a, b) for a in allowed[:20] for b in allowed[24:])},
        {"min_tokens": min(40, max_tokens), "stop_token_ids": stop_ids(rng, vocab_size)},
        {"logprobs": int(rng.integers(21))},
    ]
    picked = rng.permutation(len(choices))[: rng.integers(1, 4)]
    return {name: value for i in picked for name, value in choices[i].items()}
