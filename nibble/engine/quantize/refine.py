"""Least squares on a matrix that is already quantised: neither step makes (w - w~) H (w - w~)^T larger.

`refit` moves scales and minimums where q is given, `descend` moves one q after the other where scales are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.quantize.grid import LEAST_SCALE, Grid, QuantizedMatrix, round_to_grid, to_fp16

_SYSTEM_NUMBERS = 1 << 25  # float64: each row has a system of 2 * groups equations, so many rows are solved at a time
_DESCENT_COLUMNS = 64  # changes reach other columns' gradients in one matrix product
_RIDGE = 1e-6  # of the mean diagonal: a group whose q are all alike leaves its scale undetermined


def refined(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """w, hessian and the result as `gptq` has them."""
    matrix = descend(w, hessian, refit(w, hessian, matrix))
    return refit(w, hessian, matrix)


def row_losses(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """(w - w~) H (w - w~)^T of each row, (N,)."""
    delta = matrix.dequantized() - w
    return ((delta @ hessian) * delta).sum(-1)


def refit(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same q on the best grid, all groups of a row together; rows that fp16 would make worse stay as they are."""
    num_rows = max(1, _SYSTEM_NUMBERS // (2 * matrix.grid.scale.shape[1]) ** 2)
    sizes = [len(rows) for rows in w.split(num_rows)]
    fitted = [_fitted(rows, hessian, part) for rows, part in zip(w.split(sizes), matrix.split(sizes), strict=True)]
    scale, minimum = torch.cat([grid.scale for grid in fitted]), torch.cat([grid.minimum for grid in fitted])
    found = QuantizedMatrix(matrix.q, Grid(scale, minimum))
    is_better = (row_losses(w, hessian, found) < row_losses(w, hessian, matrix))[:, None]
    old = matrix.grid
    best = Grid(torch.where(is_better, scale, old.scale), torch.where(is_better, minimum, old.minimum))
    return QuantizedMatrix(matrix.q, best)


def _fitted(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> Grid:
    """What solves the normal equations, rounded to fp16.

    With A the (2 * groups, K) matrix of a row's q and of ones, each in the columns of its group, these are
    A H A^T p = A H w^T for p = (scale, minimum); they are solved for what p changes by.
    """
    num_groups = matrix.grid.scale.shape[1]
    group_size = w.shape[1] // num_groups
    q = matrix.q.float()
    ones = torch.ones_like(q)
    system = q.new_empty(len(q), 2, num_groups, 2, num_groups, dtype=torch.float64)
    gradient = q.new_empty(len(q), 2, num_groups, dtype=torch.float64)
    delta = w - matrix.dequantized()
    for group in range(num_groups):
        columns = slice(group * group_size, (group + 1) * group_size)
        for kind, values in enumerate((q, ones)):
            reach = values[:, columns] @ hessian[columns]  # (N, K)
            system[:, kind, group, 0] = (reach * q).unflatten(1, (num_groups, -1)).sum(-1)
            system[:, kind, group, 1] = reach.unflatten(1, (num_groups, -1)).sum(-1)
            gradient[:, kind, group] = (reach * delta).sum(-1)
    system = system.flatten(3).flatten(1, 2)
    ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
    system.diagonal(dim1=1, dim2=2).add_(ridge)
    step = torch.linalg.solve(system, gradient.flatten(1)).float().unflatten(1, (2, num_groups))
    scale, minimum = matrix.grid.scale + step[:, 0], matrix.grid.minimum + step[:, 1]
    return Grid(to_fp16(scale).clamp(min=LEAST_SCALE), to_fp16(minimum))


def descend(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> QuantizedMatrix:
    """One pass over the columns: each q becomes the best with all others as they are."""
    group_size = w.shape[1] // matrix.grid.scale.shape[1]
    gradient = ((matrix.dequantized() - w) @ hessian).T.contiguous()  # transposed from here on: a column is a row
    values, q = matrix.dequantized().T.contiguous(), matrix.q.float().T.contiguous()
    scale, minimum = matrix.grid.scale.T.contiguous(), matrix.grid.minimum.T.contiguous()
    diagonal = hessian.diagonal().tolist()
    for start in range(0, len(q), _DESCENT_COLUMNS):
        block = slice(start, min(start + _DESCENT_COLUMNS, len(q)))
        before = values[block].clone()
        inner = gradient[block].clone()  # up to date within the block
        for j in range(block.start, block.stop):
            group = j // group_size
            q[j] = round_to_grid(values[j] - inner[j - start] / diagonal[j], scale[group], minimum[group])
            value = q[j] * scale[group] + minimum[group]
            inner.addr_(hessian[block, j], value - values[j])
            values[j] = value
        gradient += hessian[:, block] @ (values[block] - before)
    return QuantizedMatrix(q.T.to(torch.uint8).contiguous(), matrix.grid)
