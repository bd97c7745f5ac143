"""Least squares after GPTQ: each step against its definition, and that none makes the loss larger."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nibble.engine.quantize import refine
from nibble.engine.quantize.gptq import damped, gptq
from nibble.engine.quantize.grid import Grid, QuantizedMatrix, minmax_grid, round_to_nearest, search_grid, to_fp16
from nibble.engine.quantize.refine import descend, refined, refit, row_losses
from nibble.engine.quantize.statistics import gram


def random_problem(seed: int, num_rows: int = 6, num_columns: int = 96) -> tuple[Tensor, Tensor, QuantizedMatrix]:
    """Weights, a damped Hessian of fewer tokens than columns, and weights rounded on it, some groups of one value."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(num_rows, num_columns, generator=generator)
    w[0, :32] = 0.25
    x = torch.randn(40, num_columns, generator=generator) @ torch.randn(num_columns, num_columns, generator=generator)
    return w, damped(gram(x), 0.01), round_to_nearest(w, minmax_grid(w, 32))


def exact_losses(w: Tensor, hessian: Tensor, matrix: QuantizedMatrix) -> Tensor:
    scale, minimum = (part.double().repeat_interleave(32, 1) for part in (matrix.grid.scale, matrix.grid.minimum))
    delta = matrix.q.double() * scale + minimum - w.double()
    return torch.einsum("ni,ij,nj->n", delta, hessian.double(), delta)


def test_losses_are_the_quadratic_form() -> None:
    w, hessian, matrix = random_problem(0)
    expected = exact_losses(w, hessian, matrix).float()
    torch.testing.assert_close(row_losses(w, hessian, matrix), expected, rtol=1e-4, atol=0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 20))
def test_no_step_makes_a_row_worse(seed: int) -> None:
    w, hessian, matrix = random_problem(seed)
    for step in (refit, descend):
        found = step(w, hessian, matrix)
        before, after = (exact_losses(w, hessian, each) for each in (matrix, found))
        assert (after <= before * (1 + 1e-4)).all(), step.__name__  # float32 sums of K * K products
        assert after.sum() < 0.9 * before.sum(), step.__name__


def test_refit_solves_least_squares() -> None:
    """Against a solution from the inputs themselves, in float64."""
    generator = torch.Generator().manual_seed(3)
    w, x = torch.randn(4, 64, generator=generator), torch.randn(500, 64, generator=generator)
    matrix = round_to_nearest(w, minmax_grid(w, 32))
    found = refit(w, gram(x), matrix)
    assert torch.equal(found.q, matrix.q)
    assert torch.equal(to_fp16(found.grid.scale), found.grid.scale)
    for row in range(4):
        by_group = [x[:, columns].double() for columns in (slice(0, 32), slice(32, 64))]
        q = matrix.q[row].double().view(2, 32)
        design = torch.stack([h @ q[g] for g, h in enumerate(by_group)] + [h.sum(1) for h in by_group], 1)
        solution = torch.linalg.lstsq(design, x.double() @ w[row].double()).solution
        ours = torch.cat((found.grid.scale[row], found.grid.minimum[row]))
        torch.testing.assert_close(ours, solution.float(), rtol=2e-3, atol=1e-3)  # fp16, and the ridge


def test_refit_of_some_rows_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian, matrix = random_problem(5)
    whole = refit(w, hessian, matrix)
    monkeypatch.setattr(refine, "_SYSTEM_NUMBERS", 4 * 6**2)  # 4 of 6 rows
    parts = refit(w, hessian, matrix)
    torch.testing.assert_close(parts.grid.scale, whole.grid.scale, rtol=2e-3, atol=1e-6)


def test_descent_is_coordinate_by_coordinate() -> None:
    """Each q in turn, all 16 values tried. More columns than a block has."""
    w, hessian, matrix = random_problem(7, num_rows=3)
    expected = matrix.q.clone()
    for row in range(3):
        for column in range(96):
            tried = expected[row].repeat(16, 1)
            tried[:, column] = torch.arange(16)
            grid = Grid(*(part[row].expand(16, -1) for part in (matrix.grid.scale, matrix.grid.minimum)))
            losses = exact_losses(w[row].expand(16, -1), hessian, QuantizedMatrix(tried, grid))
            expected[row, column] = int(losses.argmin())
    assert refine._DESCENT_COLUMNS < 96
    assert not torch.equal(expected, matrix.q)
    assert (descend(w, hessian, matrix).q == expected).float().mean() > 0.99  # a tie may fall to the other side


def test_refined_is_better_than_gptq(weights: Tensor, inputs: Tensor) -> None:
    hessian = damped(gram(inputs), 0.01)
    matrix = gptq(weights, hessian, search_grid(weights, 32, hessian))
    better = refined(weights, hessian, matrix)
    assert row_losses(weights, hessian, better).sum() < 0.85 * row_losses(weights, hessian, matrix).sum()
