"""What calibration sees of activations, added up batch by batch: nothing grows with the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelStatistics:
    """Of activations (..., *shape), over all leading axes: each result has `shape`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.count = 0
        self.minimum = torch.full(shape, torch.inf, device=device)
        self.maximum = torch.full(shape, -torch.inf, device=device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._abs_sum = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        rows = x.float().reshape(-1, *self.minimum.shape)
        self.count += len(rows)
        self.minimum = torch.minimum(self.minimum, rows.amin(0))
        self.maximum = torch.maximum(self.maximum, rows.amax(0))
        self._sum += rows.sum(0)
        self._abs_sum += rows.abs().sum(0)

    def results(self) -> dict[str, Tensor]:
        """min, max, absmax, mean and absmean, float32."""
        assert self.count, "no activations were seen"
        return {
            "min": self.minimum,
            "max": self.maximum,
            "absmax": torch.maximum(self.minimum.abs(), self.maximum.abs()),
            "mean": (self._sum / self.count).float(),
            "absmean": (self._abs_sum / self.count).float(),
        }


def gram(x: Tensor) -> Tensor:
    """Sum over tokens of x x^T, float32 (K, K)."""
    rows = x.flatten(0, -2).float()
    return rows.T @ rows
