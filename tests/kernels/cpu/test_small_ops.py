"""embedding, rms_norm, rope, silu_and_mul, gather_rows: the ops without a file-sized story."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from reference import int8_matrix

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Float16Weight, Int8Weight
from nibble.kernels.layout import KVLayout

EPS = 2.0**-23  # fp32


@pytest.mark.parametrize("group_size", [32, 96])
def test_embedding_returns_dequantized_rows(kernels: CPUKernels, rng: np.random.Generator, group_size: int) -> None:
    values = rng.integers(-128, 128, (50, 96)).astype(np.int8)
    scales = rng.random((50, 96 // group_size)).astype(np.float16)
    ids = np.array([49, 0, 7, 7], np.int32)
    out = kernels.embedding(ids, Int8Weight(values, scales, group_size))
    # a product of 8 and 11 bits is exact in fp32
    np.testing.assert_array_equal(out, int8_matrix(values, scales, group_size)[ids])


def test_embedding_returns_rows_of_a_float16_table(kernels: CPUKernels, rng: np.random.Generator) -> None:
    values = rng.standard_normal((50, 96)).astype(np.float16)
    ids = np.array([49, 0, 7, 7], np.int32)
    np.testing.assert_array_equal(kernels.embedding(ids, Float16Weight(values)), values[ids])


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(2, 64), (1, 96), (1, 256)])
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_norm_heads(
    kernels: CPUKernels, rng: np.random.Generator, num_tokens: int, num_kv_heads: int, head_dim: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim)
    qkv = rng.standard_normal((num_tokens, (4 + 2 * num_kv_heads) * head_dim)).astype(np.float32)
    weights = rng.standard_normal((2, head_dim)).astype(np.float32)
    expected = reference.norm_heads(qkv, *weights, 1e-6, layout)
    kernels.norm_heads(qkv, *weights, 1e-6, layout)
    np.testing.assert_allclose(qkv, expected, rtol=EPS * (head_dim / 16 + 8), atol=1e-30)


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("size", [32, 576])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_rms_norm(kernels: CPUKernels, rng: np.random.Generator, num_tokens: int, size: int, magnitude: float) -> None:
    x = (rng.standard_normal((num_tokens, size)) * magnitude).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    out = kernels.rms_norm(x, weight, 1e-5)
    expected = reference.rms_norm(x, weight, 1e-5)
    # the mean's rounding grows with its size / 16 additions per lane; then four roundings
    assert (np.abs(out - expected) <= EPS * (size / 16 + 8) * np.abs(expected) + 1e-30).all()


def test_rms_norm_row_does_not_depend_on_the_batch(kernels: CPUKernels, rng: np.random.Generator) -> None:
    x = rng.standard_normal((70, 576)).astype(np.float32)
    weight = rng.standard_normal(576).astype(np.float32)
    alone = np.concatenate([kernels.rms_norm(row[None], weight, 1e-5) for row in x])
    np.testing.assert_array_equal(kernels.rms_norm(x, weight, 1e-5), alone)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (16, 1)])
def test_rope_rotates_q_and_k_only(
    kernels: CPUKernels, rng: np.random.Generator, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim)
    frequencies = [10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    table = kernels.rope_table(frequencies, 200, 1.0)
    qkv = rng.standard_normal((37, (num_heads + 2 * num_kv_heads) * head_dim)).astype(np.float32)
    positions = rng.integers(0, 200, 37).astype(np.int32)
    expected = reference.rope(qkv, positions, table, layout)
    before = qkv.copy()
    kernels.rope(qkv, positions, table, layout)
    # two products and a sum of numbers below max |x|
    assert (np.abs(qkv - expected) <= 2 * EPS * np.abs(before).max()).all()
    values = num_kv_heads * head_dim
    np.testing.assert_array_equal(qkv[:, -values:], before[:, -values:])


def test_rope_table_angles_keep_their_precision(kernels: CPUKernels) -> None:
    table = kernels.rope_table([1.0, 0.37], 100_001, 1.5)
    assert table.shape == (100_001, 2, 2)
    assert table.dtype == np.float32
    assert table[100_000, 0, 1] == pytest.approx(1.5 * np.cos(37_000.0), abs=1e-6)
    assert table[100_000, 1, 1] == pytest.approx(1.5 * np.sin(37_000.0), abs=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 70])
def test_silu_and_mul(kernels: CPUKernels, rng: np.random.Generator, num_tokens: int) -> None:
    gate_up = (rng.standard_normal((num_tokens, 192)) * 20).astype(np.float32)
    gate_up[0, :8] = [0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 89, -89]
    out = kernels.silu_and_mul(gate_up)
    expected = reference.silu_and_mul(gate_up)
    # exp is good to 2 units, and four roundings follow; below exp(-87) the result is 0 for all purposes
    assert (np.abs(out - expected) <= 8 * EPS * np.abs(expected) + 1e-30).all()


def test_gather_rows_copies(kernels: CPUKernels, rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 32)).astype(np.float32)
    out = kernels.gather_rows(x, np.array([8, 0, 8], np.int32))
    np.testing.assert_array_equal(out, x[[8, 0, 8]])
    assert not np.shares_memory(out, x)
    assert kernels.gather_rows(x, np.array([], np.int32)).shape == (0, 32)
