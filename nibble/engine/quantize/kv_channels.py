"""Static ranges of keys and values, one for each layer, kv head and channel: what int8-channel KV blocks are cut by.

A channel of a rotated key takes what its pair has in turns as positions go by, and slow pairs need thousands of them.
So each key that calibration sees counts as what it would be at all positions from its own on, as far as a context goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nibble.engine.checkpoint.source import Floats
from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.statistics import ChannelStatistics
from nibble.engine.rope import inverse_frequencies

INT8_STEPS = 255
MARGIN = 1.1  # what is served goes a little beyond what calibration saw (docs/quantization.md)
# Of a channel's greatest magnitude: a range of 256 of them holds what rounding to fp16 does to it (2^-11)
_LEAST_RELATIVE_SCALE = 2.0**-18
_LEAST_SCALE = 2.0**-24


class KVObserver:
    """A KVTransform that changes nothing."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        shape = (config.num_kv_heads, config.head_dim)
        self._keys, self._values = ChannelStatistics(shape, device), ChannelStatistics(shape, device)
        frequencies = torch.tensor(inverse_frequencies(config), device=device)
        self._sweep = frequencies * config.max_context_tokens  # (D / 2,) radians

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self._values.add(v.transpose(1, 2))  # (B, T, kv heads, D)
        for bound in _bounds_of_arcs(k, self._sweep):
            self._keys.add(bound.transpose(1, 2))
        return k, v

    def results(self) -> dict[str, Tensor]:
        return {
            f"{name}.{measure}": values
            for name, statistics in (("keys", self._keys), ("values", self._values))
            for measure, values in statistics.results().items()
            if measure in ("min", "max", "absmax")
        }


def _bounds_of_arcs(k: Tensor, sweep: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest that each channel of k (..., D) becomes while pairs turn by up to sweep (D / 2,)."""
    first, second = k.float().chunk(2, dim=-1)
    radius, angle = torch.hypot(first, second), torch.atan2(second, first)
    low, high = [], []
    for zero in (0.0, math.pi / 2):  # of the cosine that the channel is
        start = angle - zero
        ends = torch.stack((start.cos(), (start + sweep).cos())) * radius
        low.append(torch.where(_passes(start, sweep, math.pi), -radius, ends.amin(0)))
        high.append(torch.where(_passes(start, sweep, 0.0), radius, ends.amax(0)))
    return torch.cat(low, dim=-1), torch.cat(high, dim=-1)


def _passes(start: Tensor, sweep: Tensor, angle: float) -> Tensor:
    return (angle - start) % (2 * math.pi) <= sweep


def kv_channels(statistics: dict[str, Floats]) -> Floats:
    """Scales and zeros as `kernels/layout.py` has them, out of `KVObserver.results`."""
    both = [_scale_and_zero(statistics, name) for name in ("keys", "values")]
    parameters: Floats = torch.stack(both, dim=1).numpy()  # (kv heads, K | V, scale | zero, D)
    return parameters


def _scale_and_zero(statistics: dict[str, Floats], name: str) -> Tensor:
    low, high, magnitude = (torch.from_numpy(statistics[f"{name}.{measure}"]) for measure in ("min", "max", "absmax"))
    scale = torch.maximum((high - low) * MARGIN / INT8_STEPS, magnitude * _LEAST_RELATIVE_SCALE).clamp(min=_LEAST_SCALE)
    return torch.stack((scale, (low + high) / 2), dim=1)  # (kv heads, 2, D)
