"""GPTQ: weights are rounded one input column after the other, and the rest of the row makes up for each error.

Frantar et al., "GPTQ" (2022), with columns in the order of falling activation energy ("act-order") and groups that stay
where they were ("static groups"), so that nothing is re-ordered at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.quantize.grid import Grid, QuantizedMatrix, round_to_grid

BLOCK_COLUMNS = 128  # errors reach later blocks in one matrix product


def damped(hessian: Tensor, damping: float) -> Tensor:
    """hessian + damping * its mean diagonal, positive definite: some inputs are always 0."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    result = hessian.clone()
    result.diagonal().add_(damping * mean)
    return result


def gptq(w: Tensor, hessian: Tensor, grid: Grid) -> QuantizedMatrix:
    """w (N, K) on the grid, with small (w - w~) H (w - w~)^T. hessian (K, K), `damped`."""
    group_size = w.shape[1] // grid.scale.shape[1]
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order]).to(w.dtype)
    left = w[:, order]
    scale, minimum = grid.scale[:, order // group_size], grid.minimum[:, order // group_size]
    q = torch.empty_like(left)
    for start in range(0, w.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, w.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            q[:, j] = round_to_grid(left[:, j], scale[:, j], minimum[:, j])
            error = (left[:, j] - (q[:, j] * scale[:, j] + minimum[:, j])) / factor[j, j]
            left[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return QuantizedMatrix(q[:, order.argsort()].to(torch.uint8), grid)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, in float64: Hessians of activations are badly conditioned."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True)
