"""Rotary frequencies of a ModelConfig, in float64. The table itself is made by the backend (`Kernels.rope_table`)."""

from __future__ import annotations

from nibble.engine.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> list[float]:
    """Angle per position of each of the head_dim / 2 rotated pairs: theta^(-2i/D), divided by the scaling factors."""
    rope = config.rope
    half = config.head_dim // 2
    divisors = rope.frequency_divisors or (1.0,) * half
    assert len(divisors) == half, f"{len(divisors)} rope divisors for head_dim {config.head_dim}"
    return [rope.theta ** (-2.0 * i / config.head_dim) / (divisors[i] * rope.linear_factor) for i in range(half)]
