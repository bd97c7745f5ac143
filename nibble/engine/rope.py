"""Rotary frequencies of a ModelConfig, in float64, and what published ways of scaling them come to.

The table itself is made by the backend (`Kernels.rope_table`). Sources: Peng et al., "YaRN" (2023); `transformers`,
modeling_rope_utils.py, for Llama 3.1's.
"""

from __future__ import annotations

import math

from nibble.engine.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each of the head_dim / 2 rotated pairs: theta^(-2i/D), divided by the scaling factors."""
    rope = config.rope
    half = config.head_dim // 2
    divisors = rope.frequency_divisors or (1.0,) * half
    assert len(divisors) == half, f"{len(divisors)} rope divisors for head_dim {config.head_dim}"
    unscaled = _unscaled(rope.theta, config.head_dim)
    return [unscaled[i] / (divisors[i] * rope.linear_factor) for i in range(half)]


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low_factor: float, high_factor: float, trained_tokens: int
) -> tuple[float, ...]:
    """1 for pairs that turn more than high_factor times within the trained context, `factor` for those that turn less
    than low_factor times, and in between what blends the two frequencies."""
    divisors = []
    for frequency in _unscaled(theta, head_dim):
        turns = trained_tokens * frequency / (2 * math.pi)
        blend = min(max((turns - low_factor) / (high_factor - low_factor), 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return tuple(divisors)


def yarn_divisors(
    theta: float,
    head_dim: int,
    factor: float,
    trained_tokens: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[float, ...]:
    """As `llama3_divisors`, but blended along the index of the pair, between those that turn beta_fast and beta_slow
    times (rounded outwards where `truncate`)."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(trained_tokens / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low or 0.001  # as everybody does it
    divisors = []
    for i in range(head_dim // 2):
        interpolated = min(max((i - low) / span, 0.0), 1.0)
        divisors.append(1 / (interpolated / factor + 1 - interpolated))
    return tuple(divisors)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What cosines and sines are multiplied by."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _unscaled(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
