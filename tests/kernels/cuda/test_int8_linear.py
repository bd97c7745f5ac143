"""int8_linear and logits on CUDA against the dequantised matrix in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from reference import int8_matrix, silu_and_mul

from nibble.kernels.interface import Int8Weight, Mode

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu

# (rows, columns, group size); from 32768 rows on every warp has its own, with fewer K is cut among warps
SHAPES = [
    (64, 32, 32),
    (33, 96, 96),
    (5, 1536, 64),
    (48, 144, 48),
    (70, 80, 16),
    (1000, 576, 32),
    (70, 576, 576),
    (999, 4096, 4096),
    (32_771, 16, 16),
    (32_800, 144, 48),
    (33_000, 208, 208),
    (32_769, 576, 32),
    (40_003, 1040, 1040),
]
NUM_TOKENS = (1, 2, 5, 8, 9, 16, 17, 31, 33, 64, 65, 130)


class Case:
    """A random matrix on the device and in float64."""

    def __init__(self, kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group: int) -> None:
        values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        scales = (rng.random((rows, columns // group)) * 0.01).astype(np.float16)
        self.weight = Int8Weight(kernels.to_device(values), kernels.to_device(scales), group)
        self.matrix = int8_matrix(values, scales, group)


def random_x(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    return rng.standard_normal((tokens, columns)).astype(np.float16)


def sum_bound(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Tensor cores add 8 or more products at a time and truncate: K / 8 additions of 2^-23, and a few of groups."""
    return 2.0**-23 * (x.shape[1] / 4 + 8) * (np.abs(x) @ np.abs(matrix).T) + 1e-30


def half_bound(result: np.ndarray) -> np.ndarray:
    return 2.0**-11 * np.abs(result) + 2.0**-24


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_logits_match_the_dequantized_matrix(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> None:
    case = Case(kernels, rng, rows, columns, group_size)
    for num_tokens in NUM_TOKENS:
        x = random_x(rng, num_tokens, columns)
        with kernels.temporaries():
            out = kernels.to_host(kernels.logits(kernels.to_device(x), case.weight))
        x = x.astype(np.float64)
        assert out.dtype == np.float32
        assert (np.abs(out - x @ case.matrix.T) <= sum_bound(x, case.matrix)).all(), f"{num_tokens} tokens"


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES[:9])
def test_product_matches_the_dequantized_matrix(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int, mode: Mode
) -> None:
    case = Case(kernels, rng, rows, columns, group_size)
    for num_tokens in NUM_TOKENS:
        x = random_x(rng, num_tokens, columns)
        with kernels.temporaries():
            out = kernels.to_host(kernels.int8_linear(kernels.to_device(x), case.weight, mode=mode))
        x = x.astype(np.float64)
        reference = x @ case.matrix.T
        bound = sum_bound(x, case.matrix) + half_bound(reference)
        if mode is Mode.PREFILL:
            bound += 2.0**-11 * (np.abs(x) @ np.abs(case.matrix).T)  # the matrix is rounded to fp16
        assert out.dtype == np.float16
        assert (np.abs(out - reference) <= bound).all(), f"{num_tokens} tokens"


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES[3:])
def test_row_does_not_depend_on_the_batch(
    kernels: CUDAKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> None:
    case = Case(kernels, rng, rows, columns, group_size)
    x = random_x(rng, 130, columns)
    on_device = kernels.to_device(x)
    alone = np.empty((130, rows), np.float32)
    for token in range(130):
        with kernels.temporaries():
            alone[token] = kernels.to_host(kernels.logits(on_device[token : token + 1], case.weight))
    for num_tokens in NUM_TOKENS:
        for start in {0, 130 - num_tokens}:
            with kernels.temporaries():
                out = kernels.to_host(kernels.logits(on_device[start : start + num_tokens], case.weight))
            np.testing.assert_array_equal(out, alone[start : start + num_tokens])


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [1, 5, 33, 70])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(96, 96, 32), (1008, 4096, 4096), (32_784, 64, 64)])
def test_bias_residual_and_gate(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    rows: int,
    columns: int,
    group_size: int,
    num_tokens: int,
    mode: Mode,
) -> None:
    case = Case(kernels, rng, rows, columns, group_size)
    x = random_x(rng, num_tokens, columns)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((num_tokens, rows)).astype(np.float32)
    device_x, device_bias = kernels.to_device(x), kernels.to_device(bias)
    x = x.astype(np.float64)
    product = x @ case.matrix.T
    bound = sum_bound(x, case.matrix) + 2.0**-22 * (np.abs(product) + np.abs(bias) + np.abs(residual))
    if mode is Mode.PREFILL:
        bound += 2.0**-11 * (np.abs(x) @ np.abs(case.matrix).T) + 2 * half_bound(product)
    with_bias = kernels.to_host(kernels.int8_linear(device_x, case.weight, device_bias, mode=mode))
    assert (np.abs(with_bias - (product + bias)) <= bound + half_bound(product + bias)).all()

    device_residual = kernels.to_device(residual)
    assert kernels.int8_linear(device_x, case.weight, device_bias, device_residual, mode=mode) is device_residual
    assert (np.abs(kernels.to_host(device_residual) - (product + bias + residual)) <= bound).all()

    gated = kernels.to_host(kernels.int8_linear(device_x, case.weight, device_bias, mode=mode, gated=True))
    reference = silu_and_mul(product + bias)
    # silu's derivative is below 1.1: errors of gate times up, of up times gate, and exp's own
    error = bound + (2 * half_bound(product + bias) if mode is Mode.PREFILL else 0)
    runs, errors = (product + bias).reshape(num_tokens, -1, 2, 8), error.reshape(num_tokens, -1, 2, 8)
    gate_error = 1.1 * errors[:, :, 0] * (np.abs(runs[:, :, 1]) + errors[:, :, 1])
    up_error = errors[:, :, 1] * np.abs(runs[:, :, 0])
    allowed = (gate_error + up_error).reshape(num_tokens, -1) + half_bound(reference) + 2.0**-18 * np.abs(reference)
    assert gated.shape == (num_tokens, rows // 2)
    assert (np.abs(gated - reference) <= allowed).all()


def test_overflow_becomes_infinite(kernels: CUDAKernels) -> None:
    values, scales = np.full((64, 64), 127, np.int8), np.full((64, 1), 10, np.float16)
    weight = Int8Weight(kernels.to_device(values), kernels.to_device(scales), 64)
    out = kernels.int8_linear(kernels.to_device(np.ones((3, 64), np.float16)), weight, mode=Mode.DECODE)
    assert np.isposinf(kernels.to_host(out)).all()


@pytest.mark.parametrize("mode", Mode)
def test_no_tokens_give_no_rows(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    case = Case(kernels, rng, 70, 96, 32)
    assert kernels.int8_linear(kernels.zeros((0, 96), np.float16), case.weight, mode=mode).shape == (0, 70)


@pytest.mark.parametrize("rows", [1000, 40_003])
def test_replayed_graph_gives_the_same(
    kernels: CUDAKernels, rng: np.random.Generator, replay: Callable[[Callable[[], None]], None], rows: int
) -> None:
    case = Case(kernels, rng, rows, 576, 32)
    x = kernels.to_device(random_x(rng, 9, 576))
    expected = kernels.to_host(kernels.logits(x, case.weight))
    results: list[Any] = []

    def step() -> None:
        results.append(kernels.logits(x, case.weight))

    replay(step)
    np.testing.assert_array_equal(kernels.to_host(results[-1]), expected)
