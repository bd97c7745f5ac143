"""rope rotates q and k in place, as the float64 reference does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import reference

from nibble.kernels.layout import KVLayout

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 96), (7, 1, 128), (2, 1, 256)])
def test_rope_rotates_q_and_k(
    kernels: CUDAKernels, rng: np.random.Generator, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim)
    qkv = rng.standard_normal((37, (num_heads + 2 * num_kv_heads) * head_dim)).astype(np.float16)
    frequencies = [10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    positions = rng.integers(0, 131072, 37).astype(np.int32)
    table = kernels.rope_table(frequencies, 131072, 1.25)
    rotated = kernels.to_device(qkv.copy())
    kernels.rope(rotated, kernels.to_device(positions), table, layout)
    out = kernels.to_host(rotated)
    angles = positions[:, None] * np.array(frequencies)
    exact_table = np.zeros((131072, 2, head_dim // 2), np.float32)
    exact_table[positions] = (np.stack((np.cos(angles), np.sin(angles)), axis=1) * 1.25).astype(np.float32)
    expected = reference.rope(qkv, positions, exact_table, layout)
    # One rounding to fp16, and fp32's of two products
    assert (np.abs(out - expected) <= 2.0**-11 * np.abs(expected) + 2.0**-22 * 8).all()
    np.testing.assert_array_equal(out[:, -num_kv_heads * head_dim :], qkv[:, -num_kv_heads * head_dim :])
