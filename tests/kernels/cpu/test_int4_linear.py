"""int4_linear against the dequantised matrix in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nibble.kernels.cpu import amx, digit_tiles
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Int4Weight, Mode
from nibble.kernels.pack import dequantize_int4, pack_int4

SHAPES = [(64, 32, 32), (70, 96, 32), (960, 576, 32), (8, 1536, 32), (130, 192, 64), (65, 384, 128), (200, 128, 128)]
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


def random_weight(rng: np.random.Generator, rows: int, columns: int, group_size: int) -> tuple[Int4Weight, np.ndarray]:
    """A weight as quantisers make them (minimum = -8 * scale and anything else), and its matrix in float64."""
    groups = columns // group_size
    q = rng.integers(0, 16, (rows, columns), dtype=np.uint8)
    scale = (rng.random((rows, groups)) * 0.1).astype(np.float16)
    minimum = np.where(rng.random((rows, groups)) < 0.5, -8 * scale, rng.standard_normal((rows, groups)) * 0.3)
    packed = pack_int4(q, scale, minimum.astype(np.float16))
    matrix = dequantize_int4(packed, rows, columns, group_size).astype(np.float64)
    return Int4Weight(packed, rows, columns, group_size), matrix


def bound(x: np.ndarray, matrix: np.ndarray, mode: Mode) -> np.ndarray:
    """The largest error of a dot product of K terms, relative to the sum of their magnitudes.

    fp32: each of the K additions and the rounding of w and the product lose half a unit of 2^-23. Integers: before, x
    is rounded by 2^-23 of the largest of its 32 columns at most. In PREFILL mode both factors are first rounded to
    bf16, half a unit of 2^-8 each; such errors are independent, so they grow as the root of the sum of squares: 8
    standard deviations of it.
    """
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
        out = kernels.int4_linear(x, weight, mode=mode)
        assert out.shape == (num_tokens, rows)
        assert out.dtype == np.float32
        reference = x.astype(np.float64) @ matrix.T
        assert (np.abs(out - reference) <= bound(x.astype(np.float64), matrix, mode)).all()


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(70, 96, 32), (960, 576, 32), (65, 384, 128)])
def test_decode_row_does_not_depend_on_the_batch(
    kernels: CPUKernels, rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> None:
    weight, _ = random_weight(rng, rows, columns, group_size)
    x = rng.standard_normal((70, columns)).astype(np.float32)
    alone = np.concatenate([kernels.int4_linear(row[None], weight, mode=Mode.DECODE) for row in x])
    for num_tokens in NUM_TOKENS:
        for start in (0, 70 - num_tokens):
            out = kernels.int4_linear(x[start : start + num_tokens], weight, mode=Mode.DECODE)
            np.testing.assert_array_equal(out, alone[start : start + num_tokens])


def test_decode_does_not_depend_on_the_number_of_threads(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight, _ = random_weight(rng, 200, 576, 32)
    x = rng.standard_normal((5, 576)).astype(np.float32)
    expected = kernels.int4_linear(x, weight, mode=Mode.DECODE)
    for num_threads in (1, 3):
        other = CPUKernels(num_threads)
        other.has_vnni = kernels.has_vnni
        np.testing.assert_array_equal(other.int4_linear(x, weight, mode=Mode.DECODE), expected)
        other.close()


@pytest.mark.parametrize("num_columns", [576, 1536])
def test_prefill_row_does_not_depend_on_the_chunk(
    kernels: CPUKernels, rng: np.random.Generator, num_columns: int
) -> None:
    weight, _ = random_weight(rng, 70, num_columns, 32)
    x = rng.standard_normal((200, num_columns)).astype(np.float32)
    whole = kernels.int4_linear(x, weight, mode=Mode.PREFILL)
    for start, stop in ((0, 64), (64, 65), (65, 130), (130, 200)):
        np.testing.assert_array_equal(kernels.int4_linear(x[start:stop], weight, mode=Mode.PREFILL), whole[start:stop])


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [1, 4, 33])
@pytest.mark.parametrize("rows", [64, 70])
def test_bias_and_residual_are_added(
    kernels: CPUKernels, rng: np.random.Generator, rows: int, num_tokens: int, mode: Mode
) -> None:
    weight, matrix = random_weight(rng, rows, 96, 32)
    x = rng.standard_normal((num_tokens, 96)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32)
    residual = rng.standard_normal((num_tokens, rows)).astype(np.float32)
    before = residual.copy()
    product = kernels.int4_linear(x, weight, mode=mode)
    np.testing.assert_array_equal(kernels.int4_linear(x, weight, bias, mode=mode), product + bias)
    assert kernels.int4_linear(x, weight, bias, residual, mode=mode) is residual
    np.testing.assert_array_equal(residual, (product + bias) + before)
    assert np.abs(product - x @ matrix.T).max() < 1


@pytest.mark.parametrize("mode", Mode)
def test_extreme_activations_stay_within_the_bound(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight, matrix = random_weight(rng, 96, 576, 32)
    x = rng.standard_normal((17, 576)).astype(np.float32)
    x[:, 7] = 1e4
    x[3] = 0
    reference = x.astype(np.float64) @ matrix.T
    out = kernels.int4_linear(x, weight, mode=mode)
    assert (np.abs(out - reference) <= bound(x.astype(np.float64), matrix, mode)).all()


@pytest.mark.parametrize("mode", Mode)
def test_nan_stays_in_its_row(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight, _ = random_weight(rng, 96, 96, 32)
    x = rng.standard_normal((20, 96)).astype(np.float32)
    x[4, 50] = np.nan
    out = kernels.int4_linear(x, weight, mode=mode)
    assert np.isnan(out[4]).all()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


def test_infinity_is_not_taken_for_a_number(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight, _ = random_weight(rng, 96, 96, 32)
    x = rng.standard_normal((6, 96)).astype(np.float32)
    x[4, 50] = -np.inf
    out = kernels.int4_linear(x, weight, mode=Mode.DECODE)
    assert not np.isfinite(out[4]).any()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


def test_each_block_of_columns_has_a_magnitude_of_its_own(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight, matrix = random_weight(rng, 64, 576, 32)
    x = rng.standard_normal((5, 576)).astype(np.float32)
    x *= np.logspace(-18, 18, 18, dtype=np.float32).repeat(32)
    x[1] = np.float32(127 * (2**16 + 2**8 + 1)) * np.sign(x[1])  # the largest digits
    x[2] = np.nextafter(np.float32(2), np.float32(0)) * np.sign(x[2])
    x[3, 32:] = 0
    reference = x.astype(np.float64) @ matrix.T
    out = kernels.int4_linear(x, weight, mode=Mode.DECODE)
    assert (np.abs(out - reference) <= bound(x.astype(np.float64), matrix, Mode.DECODE)).all()
    x[:, 32:] = 0  # the smallest block alone
    reference = x.astype(np.float64) @ matrix.T
    out = kernels.int4_linear(x, weight, mode=Mode.DECODE)
    assert (np.abs(out - reference) <= bound(x.astype(np.float64), matrix, Mode.DECODE)).all()


@pytest.mark.parametrize("mode", Mode)
def test_no_tokens_give_no_rows(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    weight, _ = random_weight(rng, 96, 96, 32)
    assert kernels.int4_linear(np.empty((0, 96), np.float32), weight, mode=mode).shape == (0, 96)


def test_without_bf16_tiles_prefill_computes_as_decode(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "is_available", lambda: False)
    plain = CPUKernels(num_threads=1)
    weight, _ = random_weight(rng, 70, 96, 32)
    x = rng.standard_normal((33, 96)).astype(np.float32)
    prefill, decode = (plain.int4_linear(x, weight, mode=mode) for mode in (Mode.PREFILL, Mode.DECODE))
    np.testing.assert_array_equal(prefill, decode)
    plain.close()


def test_read_only_weights_are_accepted(kernels: CPUKernels, rng: np.random.Generator) -> None:
    weight, matrix = random_weight(rng, 64, 64, 32)
    weight.packed.flags.writeable = False
    x = rng.standard_normal((1, 64)).astype(np.float32)
    np.testing.assert_allclose(kernels.int4_linear(x, weight, mode=Mode.DECODE), x @ matrix.T, rtol=1e-4, atol=1e-4)
