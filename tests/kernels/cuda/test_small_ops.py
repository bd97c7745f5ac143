"""The ops without a file-sized story, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
import reference
from reference import int8_matrix

from nibble.kernels.interface import Float16Weight, Int8Weight
from nibble.kernels.layout import KVLayout

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu

EPS = 2.0**-23  # fp32
EPS_HALF = 2.0**-11  # half a unit of fp16's last place, relative
TINY_HALF = 2.0**-25  # half of fp16's smallest number


@pytest.mark.parametrize(("hidden_size", "group_size"), [(96, 32), (96, 96), (4096, 4096), (4112, 16), (8192, 128)])
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_embedding_returns_dequantized_rows(
    kernels: CUDAKernels, rng: np.random.Generator, hidden_size: int, group_size: int, num_tokens: int
) -> None:
    values = rng.integers(-128, 128, (50, hidden_size)).astype(np.int8)
    scales = rng.random((50, hidden_size // group_size)).astype(np.float16)
    ids = rng.integers(0, 50, num_tokens).astype(np.int32)
    ids[:1] = 49
    weight = Int8Weight(kernels.to_device(values), kernels.to_device(scales), group_size)
    out = kernels.to_host(kernels.embedding(kernels.to_device(ids), weight))
    # a product of 8 and 11 bits is exact in fp32
    np.testing.assert_array_equal(out, int8_matrix(values, scales, group_size)[ids])
    assert out.dtype == np.float32


@pytest.mark.parametrize("hidden_size", [64, 4096, 4112])
@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_embedding_returns_rows_of_a_float16_table(
    kernels: CUDAKernels, rng: np.random.Generator, hidden_size: int, num_tokens: int
) -> None:
    values = rng.standard_normal((50, hidden_size)).astype(np.float16)
    ids = rng.integers(0, 50, num_tokens).astype(np.int32)
    ids[:1] = 49
    out = kernels.embedding(kernels.to_device(ids), Float16Weight(kernels.to_device(values)))
    np.testing.assert_array_equal(kernels.to_host(out), values[ids])
    assert out.dtype == np.float32


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 64), (1, 96), (8, 128), (1, 256)])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_norm_heads(
    kernels: CUDAKernels, rng: np.random.Generator, num_tokens: int, num_kv_heads: int, head_dim: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim)
    qkv = rng.standard_normal((num_tokens, 6 * num_kv_heads * head_dim)).astype(np.float16)
    weights = rng.standard_normal((2, head_dim)).astype(np.float32)
    on_gpu = kernels.to_device(qkv)
    kernels.norm_heads(on_gpu, kernels.to_device(weights[0]), kernels.to_device(weights[1]), 1e-6, layout)
    out, expected = kernels.to_host(on_gpu), reference.norm_heads(qkv, *weights, 1e-6, layout)
    values = slice(-num_kv_heads * head_dim, None)
    np.testing.assert_array_equal(out[:, values], qkv[:, values])
    assert (np.abs(out - expected) <= (EPS * 20 + EPS_HALF) * np.abs(expected) + TINY_HALF).all()


@pytest.mark.parametrize("columns", [32, 300, 4096])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_permute_columns(kernels: CUDAKernels, rng: np.random.Generator, num_tokens: int, columns: int) -> None:
    x = rng.standard_normal((num_tokens, columns)).astype(np.float16)
    order = rng.permutation(columns).astype(np.int32)
    out = kernels.permute_columns(kernels.to_device(x), kernels.to_device(order))
    np.testing.assert_array_equal(kernels.to_host(out), x[:, order])


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 70])
@pytest.mark.parametrize("size", [8, 32, 50, 577, 1000, 4096, 8192, 8200, 16384])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_rms_norm(kernels: CUDAKernels, rng: np.random.Generator, num_tokens: int, size: int, magnitude: float) -> None:
    x = (rng.standard_normal((num_tokens, size)) * magnitude).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    out = kernels.to_host(kernels.rms_norm(kernels.to_device(x), kernels.to_device(weight), 1e-5))
    expected = reference.rms_norm(x, weight, 1e-5)
    # A thread adds size / 32 numbers at most, then two trees of 5; the square root halves the sum's error, rsqrt's own
    # is 2 units; then two products and the rounding to fp16.
    relative = EPS * (size / 64 + 16) + EPS_HALF
    assert out.dtype == np.float16
    assert (np.abs(out - expected) <= relative * np.abs(expected) + TINY_HALF).all()


@pytest.mark.parametrize("size", [577, 576, 4096, 16384])
def test_rms_norm_row_does_not_depend_on_the_batch(kernels: CUDAKernels, rng: np.random.Generator, size: int) -> None:
    x = kernels.to_device(rng.standard_normal((70, size)).astype(np.float32))
    weight = kernels.to_device(rng.standard_normal(size).astype(np.float32))
    alone = np.concatenate([kernels.to_host(kernels.rms_norm(x[i : i + 1], weight, 1e-5)) for i in range(70)])
    np.testing.assert_array_equal(kernels.to_host(kernels.rms_norm(x, weight, 1e-5)), alone)


def test_rms_norm_keeps_what_is_not_finite(kernels: CUDAKernels) -> None:
    x = np.ones((4, 64), np.float32)
    x[0, 5], x[1, 63], x[2] = np.nan, np.inf, 1e30
    out = kernels.to_host(kernels.rms_norm(kernels.to_device(x), kernels.to_device(np.ones(64, np.float32)), 1e-5))
    assert np.isnan(out[0]).all()
    assert np.isnan(out[1, 63])
    assert not out[2].any()  # the mean of the squares is inf: zeros, as in float32 on the CPU
    assert np.isfinite(out[3]).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9, 300])
@pytest.mark.parametrize("columns", [16, 192, 28672])
def test_silu_and_mul(kernels: CUDAKernels, rng: np.random.Generator, num_tokens: int, columns: int) -> None:
    gate_up = (rng.standard_normal((num_tokens, columns)) * 20).astype(np.float16)
    gate_up[:1, :8] = [0, -0.0, 1e-7, -1e-7, 65504, -65504, 89, -88]
    out = kernels.to_host(kernels.silu_and_mul(kernels.to_device(gate_up)))
    expected = reference.silu_and_mul(gate_up)
    with np.errstate(over="ignore"):
        overflows = np.isinf(expected.astype(np.float16))
    # exp's error is that of its argument, at most 2^-23 * |gate|; a few roundings; the rounding to fp16
    within = np.abs(out - expected) <= (EPS * 128 + EPS_HALF) * np.abs(expected) + TINY_HALF
    assert (within | (overflows & np.isinf(out))).all()


def test_silu_and_mul_propagates_nan(kernels: CUDAKernels) -> None:
    gate_up = np.ones((1, 32), np.float16)
    gate_up[0, 3] = gate_up[0, 16 + 8 + 4] = np.nan
    out = kernels.to_host(kernels.silu_and_mul(kernels.to_device(gate_up)))
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [3, 12]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [1, 8, 33, 4096, 20000])
def test_gather_rows_copies(kernels: CUDAKernels, rng: np.random.Generator, dtype: type, size: int) -> None:
    x = rng.standard_normal((9, size)).astype(dtype)
    rows = np.array([8, 0, 8, 3], np.int32)
    out = kernels.to_host(kernels.gather_rows(kernels.to_device(x), kernels.to_device(rows)))
    np.testing.assert_array_equal(out, x[rows])
    assert kernels.gather_rows(kernels.to_device(x), kernels.to_device(rows[:0])).shape == (0, size)


@pytest.mark.parametrize("num_ids", [0, 1, 255, 256, 1000])
def test_gather_ids_takes_negative_ones_from_the_latest(
    kernels: CUDAKernels, rng: np.random.Generator, num_ids: int
) -> None:
    latest = rng.integers(-1, 100, 300).astype(np.int32)
    ids = rng.integers(-300, 300, num_ids).astype(np.int32)
    out = kernels.to_host(kernels.gather_ids(kernels.to_device(ids), kernels.to_device(latest)))
    expected = [i if i >= 0 else max(latest[-1 - i], 0) for i in ids]
    np.testing.assert_array_equal(out, np.array(expected, np.int32))


@pytest.mark.parametrize("num_ids", [0, 1, 300])
def test_scatter_ids_skips_negative_indices(kernels: CUDAKernels, rng: np.random.Generator, num_ids: int) -> None:
    latest = np.full(1000, 7, np.int32)
    indices = rng.permutation(1000)[:num_ids].astype(np.int32)
    indices[::3] = -1
    ids = rng.integers(0, 1000, num_ids).astype(np.int32)
    on_device = kernels.to_device(latest)
    kernels.scatter_ids(kernels.to_device(ids), kernels.to_device(indices), on_device)
    latest[indices[indices >= 0]] = ids[indices >= 0]
    np.testing.assert_array_equal(kernels.to_host(on_device), latest)


def test_small_ops_replay_from_a_graph(
    kernels: CUDAKernels, rng: np.random.Generator, replay: Callable[[Callable[[], None]], None]
) -> None:
    table = Int8Weight(
        kernels.to_device(rng.integers(-128, 128, (20, 64)).astype(np.int8)),
        kernels.to_device(rng.random((20, 1)).astype(np.float16)),
        64,
    )
    latest = kernels.to_device(np.array([3, 5], np.int32))
    ids = kernels.to_device(np.array([-1, 2, -2], np.int32))
    rows = kernels.to_device(np.array([2, 0], np.int32))
    norm = kernels.to_device(rng.random(64).astype(np.float32))
    results: list[object] = []

    def step() -> None:
        x = kernels.embedding(kernels.gather_ids(ids, latest), table)
        h = kernels.silu_and_mul(kernels.rms_norm(x, norm, 1e-5))
        results[:] = [kernels.gather_rows(h, rows)]

    step()
    expected = kernels.to_host(results[0])
    replay(step)
    np.testing.assert_array_equal(kernels.to_host(results[0]), expected)
