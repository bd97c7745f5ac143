"""float16_linear against the matrix in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nibble.kernels.interface import Float16Weight, Mode

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


def random_weight(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float16)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (48, 96), (1000, 576), (4096, 1536)])
@pytest.mark.parametrize("has_extras", [False, True], ids=["plain", "bias and residual"])
def test_product_matches_the_matrix(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, mode: Mode, has_extras: bool
) -> None:
    values = random_weight(rng, rows, columns)
    weight = Float16Weight(kernels.to_device(values))
    bias = rng.standard_normal(rows).astype(np.float32)
    for num_tokens in (0, 1, 5, 64, 70, 200):
        x = rng.standard_normal((num_tokens, columns)).astype(np.float16)
        product = x.astype(np.float64) @ values.astype(np.float64).T
        bound = 2.0**-11 * (np.abs(product) + 8) + 2.0**-22 * columns
        if not has_extras:
            out = kernels.to_host(kernels.float16_linear(kernels.to_device(x), weight, mode=mode))
            assert (np.abs(out - product) <= bound).all()
            continue
        residual = rng.standard_normal((num_tokens, rows)).astype(np.float32)
        target = kernels.to_device(residual)
        out = kernels.float16_linear(kernels.to_device(x), weight, kernels.to_device(bias), target, mode=mode)
        assert out is target
        assert (np.abs(kernels.to_host(out) - (product + bias + residual)) <= bound).all()


@pytest.mark.parametrize("mode", Mode)
def test_gated_is_silu_and_mul_of_the_product(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight = Float16Weight(kernels.to_device(random_weight(rng, 64, 96)))
    x = kernels.to_device(rng.standard_normal((70, 96)).astype(np.float16))
    expected = kernels.to_host(kernels.silu_and_mul(kernels.float16_linear(x, weight, mode=mode)))
    np.testing.assert_array_equal(kernels.to_host(kernels.float16_linear(x, weight, mode=mode, gated=True)), expected)


@pytest.mark.parametrize(("rows", "columns"), [(300, 192), (49152, 576), (4096, 4096)])
def test_row_does_not_depend_on_the_batch(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    rows: int,
    columns: int,
    replay: Callable[[Callable[[], None]], None],
) -> None:
    weight = Float16Weight(kernels.to_device(random_weight(rng, rows, columns)))
    x = kernels.to_device(rng.standard_normal((70, columns)).astype(np.float16))
    together = kernels.to_host(kernels.logits(x, weight))
    many = kernels.to_device(rng.standard_normal((1500, columns)).astype(np.float16))
    products = kernels.to_host(kernels.float16_linear(many, weight, mode=Mode.PREFILL))
    for part in (slice(0, 1), slice(3, 130), slice(500, 1013)):
        some = kernels.to_host(kernels.float16_linear(many[part], weight, mode=Mode.PREFILL))
        np.testing.assert_array_equal(some, products[part])
    for i in (0, 1, 63, 64, 69):
        np.testing.assert_array_equal(kernels.to_host(kernels.logits(x[i : i + 1], weight))[0], together[i])
    result = kernels.zeros((3, rows), np.float32)

    def step() -> None:
        with kernels.temporaries():
            result.data.copy_from_device_async(kernels.logits(x[5:8], weight).data, result.nbytes)

    replay(step)
    np.testing.assert_array_equal(kernels.to_host(result), together[5:8])
