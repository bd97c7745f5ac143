"""The INT4 grid: groups of a row share a scale and a minimum, w ~ scale * q + minimum with q in 0..15.

`kernels/interface.py` (Int4Weight) is the format: scale and minimum are fp16, so both are rounded to fp16 before any q
is chosen. Errors are measured through a Hessian H = sum of x x^T over calibration inputs x: d H d^T is the squared
error of a row's output where its weights are off by d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.layout import GROUP_SIZES

MAX_Q = 15
SHRINK_STEPS, SHRINK_STEP = 20, 0.025  # ranges tried: 1, 0.975, ... of what a group spans
LEAST_SCALE = 2.0**-24  # fp16's smallest


@dataclass(frozen=True)
class Grid:
    """scale and minimum (N, groups), float32 that fp16 holds exactly."""

    scale: Tensor
    minimum: Tensor


@dataclass(frozen=True)
class QuantizedMatrix:
    """q uint8 (N, K) on a grid of K / group_size groups."""

    q: Tensor
    grid: Grid

    def dequantized(self) -> Tensor:
        """New float32 (N, K)."""
        groups = self.q.view(*self.grid.scale.shape, -1).float()
        return (groups * self.grid.scale[:, :, None] + self.grid.minimum[:, :, None]).flatten(1)

    def split(self, sizes: list[int]) -> list[QuantizedMatrix]:
        """Matrices of so many rows each."""
        parts = (self.q.split(sizes), self.grid.scale.split(sizes), self.grid.minimum.split(sizes))
        return [QuantizedMatrix(q, Grid(scale, minimum)) for q, scale, minimum in zip(*parts, strict=True)]


def fitting_group_size(wanted: int, in_features: int) -> int:
    """The largest group of the native format that is not larger than `wanted` and divides in_features."""
    return max(size for size in GROUP_SIZES if size <= wanted and in_features % size == 0)


def to_fp16(x: Tensor) -> Tensor:
    """Rounded to what fp16 holds, as float32."""
    return x.half().float()


def round_to_grid(w: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest q, as float32; shapes that broadcast."""
    return ((w - minimum) / scale).round_().clamp_(0, MAX_Q)


def minmax_grid(w: Tensor, group_size: int, shrink: float = 1.0) -> Grid:
    """From each group's least to its greatest weight, both moved towards 0 by the factor `shrink`.

    0 is on the grid: the minimum is a whole number of scales.
    """
    groups = w.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    scale = to_fp16((high - low) / MAX_Q).clamp(min=LEAST_SCALE)
    zero = (-low / scale).round().clamp(0, MAX_Q)
    return Grid(scale, to_fp16(-scale * zero))


def round_to_nearest(w: Tensor, grid: Grid) -> QuantizedMatrix:
    groups = w.unflatten(1, (grid.scale.shape[1], -1))
    q = round_to_grid(groups, grid.scale[:, :, None], grid.minimum[:, :, None])
    return QuantizedMatrix(q.flatten(1).to(torch.uint8), grid)


def search_grid(w: Tensor, group_size: int, hessian: Tensor | None = None) -> Grid:
    """For each group of a row the shrunk range whose rounding errs least, each group for itself.

    hessian (K, K): errors count as the output sees them; without it all weights count the same.
    """
    blocks = None
    if hessian is not None:
        blocks = torch.stack(
            [hessian[i : i + group_size, i : i + group_size] for i in range(0, w.shape[1], group_size)]
        )
    best = minmax_grid(w, group_size)
    best_error = _group_errors(w, best, blocks)
    for step in range(1, SHRINK_STEPS):
        grid = minmax_grid(w, group_size, 1 - step * SHRINK_STEP)
        error = _group_errors(w, grid, blocks)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        scale, minimum = (
            torch.where(is_better, grid.scale, best.scale),
            torch.where(is_better, grid.minimum, best.minimum),
        )
        best = Grid(scale, minimum)
    return best


def _group_errors(w: Tensor, grid: Grid, blocks: Tensor | None) -> Tensor:
    """d H d^T of each group, (N, groups); blocks (groups, group_size, group_size) are H's."""
    delta = (round_to_nearest(w, grid).dequantized() - w).unflatten(1, (grid.scale.shape[1], -1))
    if blocks is None:
        return delta.square().sum(-1)
    return (torch.einsum("ngi,gij->ngj", delta, blocks) * delta).sum(-1)
