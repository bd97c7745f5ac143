"""The INT4 grid: what it holds, and how well a searched one fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from nibble.engine.quantize.grid import (
    SHRINK_STEP,
    SHRINK_STEPS,
    fitting_group_size,
    minmax_grid,
    round_to_nearest,
    search_grid,
)
from nibble.engine.quantize.statistics import gram
from nibble.kernels.pack import dequantize_int4, pack_int4


def test_what_is_dequantised_here_is_what_kernels_read(weights: Tensor) -> None:
    matrix = round_to_nearest(weights, minmax_grid(weights, 32))
    packed = pack_int4(matrix.q.numpy(), *(part.half().numpy() for part in (matrix.grid.scale, matrix.grid.minimum)))
    np.testing.assert_array_equal(dequantize_int4(packed, 24, 64, 32), matrix.dequantized().numpy())


@settings(deadline=None)
@given(arrays(np.float32, (3, 32), elements=st.floats(-8, 8, width=32)))
def test_every_weight_is_within_a_step_of_its_value(values: np.ndarray) -> None:  # type: ignore[type-arg]
    w = torch.from_numpy(values)
    grid = minmax_grid(w, 32)
    error = (round_to_nearest(w, grid).dequantized() - w).abs()
    # Half a step of rounding, half a step that the ends move because 0 is on the grid, and fp16's own rounding.
    assert (error <= grid.scale * (1 + 16 * 2.0**-10) + 2.0**-20).all()


def test_zero_stays_zero(weights: Tensor) -> None:
    weights[:, ::3] = 0
    matrix = round_to_nearest(weights, minmax_grid(weights, 32))
    assert (matrix.dequantized()[:, ::3].abs() <= matrix.grid.scale.max() * 2.0**-7).all()  # fp16 of a multiple


def test_searched_grid_is_the_best_of_those_tried(weights: Tensor, inputs: Tensor) -> None:
    hessian = gram(inputs)

    def errors(w: Tensor) -> Tensor:
        delta = (w - weights).view(24, 2, 32)
        return torch.stack(
            [(delta[:, g] @ hessian[g * 32 :, g * 32 :][:32, :32] * delta[:, g]).sum(1) for g in (0, 1)], 1
        )

    tried = [
        errors(round_to_nearest(weights, minmax_grid(weights, 32, 1 - step * SHRINK_STEP)).dequantized())
        for step in range(SHRINK_STEPS)
    ]
    found = errors(round_to_nearest(weights, search_grid(weights, 32, hessian)).dequantized())
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("wanted", "in_features", "size"), [(128, 576, 64), (128, 96, 32), (64, 4096, 64), (128, 256, 128)]
)
def test_group_divides_the_row(wanted: int, in_features: int, size: int) -> None:
    assert fitting_group_size(wanted, in_features) == size
