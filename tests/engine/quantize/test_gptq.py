"""GPTQ against its definition, and what it and the correction are for."""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.quantize.gptq import damped, gptq
from nibble.engine.quantize.grid import Grid, minmax_grid, round_to_grid, round_to_nearest
from nibble.engine.quantize.statistics import gram


def obq_in_order(w: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Optimal brain quantisation in float64, column by column: the inverse of what is left is computed anew."""
    w, order = w.double().clone(), hessian.diagonal().argsort(descending=True).tolist()
    group = torch.arange(w.shape[1]) // (w.shape[1] // grid.scale.shape[1])
    q = torch.zeros_like(w)
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(hessian.double()[left][:, left])
        scale, minimum = grid.scale[:, group[column]].double(), grid.minimum[:, group[column]].double()
        q[:, column] = round_to_grid(w[:, column], scale, minimum)
        error = (w[:, column] - (q[:, column] * scale + minimum)) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return q


def loss(w: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((rounded - w) @ x.T).square().sum())


def test_gptq_rounds_as_optimal_brain_quantisation_does(weights: Tensor, inputs: Tensor) -> None:
    hessian, grid = damped(gram(inputs), 0.01), minmax_grid(weights, 32)
    expected = obq_in_order(weights, hessian, grid)
    same = gptq(weights, hessian, grid).q == expected
    assert same.float().mean() > 0.995  # a tie may fall to the other side in float32


def test_gptq_keeps_the_output_better_than_rounding(weights: Tensor, inputs: Tensor) -> None:
    grid = minmax_grid(weights, 32)
    nearest = loss(weights, round_to_nearest(weights, grid).dequantized(), inputs)
    ours = loss(weights, gptq(weights, damped(gram(inputs), 0.01), grid).dequantized(), inputs)
    assert ours < 0.6 * nearest


def test_blocks_of_columns_change_nothing(weights: Tensor, inputs: Tensor) -> None:
    """More columns than one block has: the second half must see the errors of the first."""
    w, x = torch.cat([weights] * 3, 1), torch.cat([inputs, inputs.roll(1, 0), inputs.roll(2, 0)], 1)
    hessian, grid = damped(gram(x), 0.1), minmax_grid(w, 64)
    assert (gptq(w, hessian, grid).q == obq_in_order(w, hessian, grid)).float().mean() > 0.99


def test_inputs_that_are_always_zero_do_no_harm(weights: Tensor, inputs: Tensor) -> None:
    inputs[:, 7] = 0
    rounded = gptq(weights, damped(gram(inputs), 0.01), minmax_grid(weights, 32)).dequantized()
    assert rounded.isfinite().all()
