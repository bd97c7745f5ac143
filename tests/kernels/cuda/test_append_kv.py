"""append_kv writes the bytes that layout.py states, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import reference
from kv_channels import channels_of

from nibble.kernels.interface import KVChannels
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_append_writes_the_specified_bytes(
    kernels: CUDAKernels, rng: np.random.Generator, dtype: KVDtype, num_kv_heads: int, head_dim: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim, dtype)
    qkv = rng.standard_normal((70, 3 * num_kv_heads * head_dim))
    start = num_kv_heads * head_dim
    qkv[0, start : start + head_dim] = 3.25  # constant: scale 0
    qkv[1, start : start + head_dim] = 0
    qkv[2, start : start + head_dim] *= 1e4
    qkv[3, start : start + head_dim] *= 1e6  # clipped to fp16's range below
    qkv[5, start : start + head_dim] *= 1e-6  # a scale that is a denormal or 0 in fp16
    qkv[6, start : start + head_dim] += 1000  # large zero, small scale
    qkv[7, start : start + head_dim] = np.linspace(-127.5, 127.5, head_dim)  # ties
    qkv[8, start : start + head_dim] = np.where(np.arange(head_dim) % 2, 65504, -65504)
    qkv = np.clip(qkv, -65504, 65504).astype(np.float16)
    slots = rng.permutation(4 * BLOCK_SIZE)[:70].astype(np.int64)
    slots[9] = -1  # skipped
    expected = np.full((4, num_kv_heads, layout.head_block_bytes), 0xFF, np.uint8)
    written = kernels.to_device(expected.copy())
    channels = channels_of(kernels, layout)
    kernels.append_kv(kernels.to_device(qkv), kernels.to_device(slots), written, layout, channels)
    keep = slots >= 0
    num_saturated = reference.append_kv(qkv[keep].astype(np.float32), slots[keep], expected, layout)
    np.testing.assert_array_equal(kernels.to_host(written), expected)
    if channels is not None:
        assert kernels.to_host(channels.num_saturated)[0] == num_saturated > 4 * head_dim


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_a_channel_cannot_say_saturates_and_is_counted(
    kernels: CUDAKernels, rng: np.random.Generator, value: float
) -> None:
    layout = KVLayout(1, 64, KVDtype.INT8_CHANNEL)
    qkv = np.clip(rng.standard_normal((2, 3 * 64)) * 0.1, -0.3, 0.3).astype(np.float16)
    qkv[1, 64 + 17] = value
    parameters = np.full(layout.channels_shape, 0.004, np.float32)
    channels = KVChannels(kernels.to_device(parameters), kernels.zeros((1,), np.int64))
    cache = kernels.to_device(np.zeros((1, 1, layout.head_block_bytes), np.uint8))
    slots = kernels.to_device(np.arange(2, dtype=np.int64))
    kernels.append_kv(kernels.to_device(qkv), slots, cache, layout, channels)
    expected = np.rint((qkv[:, 64:128].astype(np.float32) - np.float32(0.004)) / np.float32(0.004))
    expected[1, 17] = 127 if value == np.inf else -128
    np.testing.assert_array_equal(kernels.to_host(cache)[0, 0, :128].view(np.int8).reshape(2, 64), expected)
    assert kernels.to_host(channels.num_saturated)[0] == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_row_that_is_not_finite_is_cached_as_nan(
    kernels: CUDAKernels, rng: np.random.Generator, value: float
) -> None:
    layout = KVLayout(1, 64)
    qkv = rng.standard_normal((2, 3 * 64)).astype(np.float16)
    qkv[1, 64 + 17] = value
    cache = kernels.to_device(np.zeros((1, 1, layout.head_block_bytes), np.uint8))
    kernels.append_kv(kernels.to_device(qkv), kernels.to_device(np.arange(2, dtype=np.int64)), cache, layout)
    keys, values = reference.read_kv(kernels.to_host(cache), layout)[0, 0]
    assert np.isnan(keys[1]).all()
    assert np.isfinite(keys[0]).all()
    assert np.isfinite(values).all()
