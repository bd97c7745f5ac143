"""int8_linear against the dequantised matrix in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from reference import int8_matrix

from nibble.kernels.cpu import digit_tiles
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Int8Weight, Mode

SHAPES = [(64, 32, 32), (33, 96, 96), (1000, 576, 32), (70, 576, 576), (5, 1536, 64), (40, 96, 16)]
NUM_TOKENS = (1, 2, 3, 5, 8, 9, 17, 70)


@pytest.fixture(scope="module", params=["integers", "floats"])
def kernels(request: pytest.FixtureRequest) -> Iterator[CPUKernels]:
    """The backend with its integer arithmetic, and as it is on CPUs without AVX512-VNNI."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "floats":
            patch.setattr(digit_tiles, "is_available", lambda: False)
        elif not digit_tiles.is_available():
            pytest.skip("this CPU has no AVX512-VNNI")
        backend = CPUKernels(num_threads=2)
    yield backend
    backend.close()


def random_weight(rng: np.random.Generator, rows: int, columns: int, group_size: int) -> tuple[Int8Weight, np.ndarray]:
    values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = (rng.random((rows, columns // group_size)) * 0.01).astype(np.float16)
    return Int8Weight(values, scales, group_size), int8_matrix(values, scales, group_size)


def bound(x: np.ndarray, matrix: np.ndarray, mode: Mode) -> np.ndarray:
    """As for int4_linear: K additions in fp32, x rounded to integers; in PREFILL mode both factors rounded to bf16."""
    fp32 = 2.0**-24 * (x.shape[1] + 4) * (np.abs(x) @ np.abs(matrix).T)
    if mode is Mode.DECODE:
        largest = np.abs(x).reshape(len(x), -1, 32).max(axis=2).repeat(32, axis=1)
        return fp32 + 2.0**-23 * (largest @ np.abs(matrix).T) + 1e-30
    return fp32 + 8 * 2.0**-9 * np.sqrt(2 * (x**2) @ (matrix**2).T) + 1e-30


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_product_matches_the_dequantized_matrix(
    kernels: CPUKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int, mode: Mode
) -> None:
    weight, matrix = random_weight(rng, rows, columns, group_size)
    for num_tokens in NUM_TOKENS:
        x = rng.standard_normal((num_tokens, columns)).astype(np.float32)
        out = kernels.int8_linear(x, weight, mode=mode)
        assert out.shape == (num_tokens, rows)
        reference = x.astype(np.float64) @ matrix.T
        assert (np.abs(out - reference) <= bound(x.astype(np.float64), matrix, mode)).all()


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(70, 96, 32), (1000, 576, 32)])
def test_decode_row_does_not_depend_on_the_batch(
    kernels: CPUKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> None:
    weight, _ = random_weight(rng, rows, columns, group_size)
    x = rng.standard_normal((70, columns)).astype(np.float32)
    alone = np.concatenate([kernels.int8_linear(row[None], weight, mode=Mode.DECODE) for row in x])
    for num_tokens in NUM_TOKENS:
        for start in (0, 70 - num_tokens):
            out = kernels.int8_linear(x[start : start + num_tokens], weight, mode=Mode.DECODE)
            np.testing.assert_array_equal(out, alone[start : start + num_tokens])


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
def test_bias_and_residual_are_added(
    kernels: CPUKernels, rng: np.random.Generator, num_tokens: int, mode: Mode
) -> None:
    weight, _ = random_weight(rng, 70, 96, 32)
    x = rng.standard_normal((num_tokens, 96)).astype(np.float32)
    bias = rng.standard_normal(70).astype(np.float32)
    residual = rng.standard_normal((num_tokens, 70)).astype(np.float32)
    before = residual.copy()
    product = kernels.int8_linear(x, weight, mode=mode)
    np.testing.assert_array_equal(kernels.int8_linear(x, weight, bias, mode=mode), product + bias)
    assert kernels.int8_linear(x, weight, bias, residual, mode=mode) is residual
    np.testing.assert_array_equal(residual, (product + bias) + before)


@pytest.mark.parametrize("mode", Mode)
def test_no_tokens_give_no_rows(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight, _ = random_weight(rng, 70, 96, 32)
    assert kernels.int8_linear(np.empty((0, 96), np.float32), weight, mode=mode).shape == (0, 70)
