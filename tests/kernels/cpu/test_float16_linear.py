"""float16_linear against the matrix in float64."""

from __future__ import annotations

import numpy as np
import pytest

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Float16Weight, Mode


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (33, 96), (1000, 576), (5, 1536)])
@pytest.mark.parametrize("has_extras", [False, True], ids=["plain", "bias and residual"])
def test_product_matches_the_matrix(
    kernels: CPUKernels, rng: np.random.Generator, rows: int, columns: int, mode: Mode, has_extras: bool
) -> None:
    values = rng.standard_normal((rows, columns)).astype(np.float16)
    bias = rng.standard_normal(rows).astype(np.float32) if has_extras else None
    for num_tokens in (0, 1, 2, 3, 5, 8, 9, 17, 70):
        x = rng.standard_normal((num_tokens, columns)).astype(np.float32)
        expected = x.astype(np.float64) @ values.astype(np.float64).T + (0 if bias is None else bias)
        residual = rng.standard_normal((num_tokens, rows)).astype(np.float32) if has_extras else None
        expected += 0 if residual is None else residual
        out = kernels.float16_linear(x, Float16Weight(values), bias, residual, mode=mode)
        assert out is residual or residual is None
        bound = 2.0**-24 * (columns / 16 + 8) * (np.abs(x) @ np.abs(values.astype(np.float32)).T + 8)
        assert (np.abs(out - expected) <= bound).all()


def test_gated_is_silu_and_mul_of_the_product(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight = Float16Weight((rng.standard_normal((64, 96)) / 10).astype(np.float16))
    x = rng.standard_normal((5, 96)).astype(np.float32)
    product = kernels.float16_linear(x, weight, mode=Mode.DECODE)
    gated = kernels.float16_linear(x, weight, mode=Mode.DECODE, gated=True)
    np.testing.assert_array_equal(gated, kernels.silu_and_mul(product))


def test_row_does_not_depend_on_the_batch(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight = Float16Weight(rng.standard_normal((300, 192)).astype(np.float16))
    x = rng.standard_normal((70, 192)).astype(np.float32)
    together = kernels.logits(x, weight)
    alone = np.concatenate([kernels.logits(x[i : i + 1], weight) for i in range(70)])
    np.testing.assert_array_equal(together, alone)
