"""Launches append_kv.cu: appending alone, or after the rotation of q and k."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import BLOCK, HEAD_DIMS, KV_TYPES, check_table, defines, num_query_heads
from nibble.kernels.interface import KVChannels
from nibble.kernels.layout import KVDtype, KVLayout

VARIANTS: tuple[Defines, ...] = tuple(
    (("HEAD_DIM", d), ("KV_TYPE", kind)) for d in HEAD_DIMS for kind in KV_TYPES.values()
)


def check_cache(kv_cache: cupy.ndarray, layout: KVLayout) -> None:
    """One layer's cache, uint8 (num_blocks, num_kv_heads, head_block_bytes)."""
    assert kv_cache.dtype == np.uint8, f"the cache is {kv_cache.dtype}, expected uint8"
    expected = (layout.num_kv_heads, layout.head_block_bytes)
    assert kv_cache.shape[1:] == expected, f"the cache's blocks are {kv_cache.shape[1:]}, expected {expected}"


def channel_arrays(
    channels: KVChannels | None, layout: KVLayout
) -> tuple[cupy.ndarray, cupy.ndarray] | tuple[None, None]:
    """What a kernel gets of them: parameters and counter, or nothing where the blocks want none."""
    assert (layout.dtype is KVDtype.INT8_CHANNEL) == (channels is not None), "channels go with int8-channel blocks"
    if channels is None:
        return None, None
    parameters, count = channels.parameters, channels.num_saturated
    expected = (layout.channels_shape, np.float32)
    assert (parameters.shape, parameters.dtype) == expected, f"channels are {parameters.dtype} {parameters.shape}"
    assert (count.shape, count.dtype) == ((1,), np.int64), "num_saturated must be int64 (1,)"
    return parameters, count


def append_kv(
    device: Device,
    qkv: cupy.ndarray,
    slots: cupy.ndarray,
    kv_cache: cupy.ndarray,
    layout: KVLayout,
    channels: KVChannels | None = None,
) -> None:
    """See `Kernels.append_kv`; qkv is float16. A slot below 0 is skipped."""
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    assert (slots.shape, slots.dtype) == ((len(qkv),), np.int64), "slots must be int64 (T,)"
    device.kernel("append_kv", "append_kv", defines(layout)).launch(
        (len(qkv), 1, 1),
        BLOCK,
        qkv,
        slots,
        kv_cache,
        *channel_arrays(channels, layout),
        np.int32(num_heads),
        np.int32(layout.num_kv_heads),
    )


def rope_append_kv(
    device: Device,
    qkv: cupy.ndarray,
    positions: cupy.ndarray,
    slots: cupy.ndarray,
    table: cupy.ndarray,
    kv_cache: cupy.ndarray,
    layout: KVLayout,
    channels: KVChannels | None = None,
) -> None:
    """`rope`, then `append_kv`; of qkv only q is rotated in place, k goes to the cache alone."""
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    check_table(table, layout)
    assert (slots.shape, slots.dtype) == ((len(qkv),), np.int64), "slots must be int64 (T,)"
    assert (positions.shape, positions.dtype) == ((len(qkv),), np.int32), "positions must be int32 (T,)"
    device.kernel("append_kv", "rope_append_kv", defines(layout)).launch(
        (len(qkv), 1, 1),
        BLOCK,
        qkv,
        positions,
        slots,
        table,
        kv_cache,
        *channel_arrays(channels, layout),
        np.int32(num_heads),
        np.int32(layout.num_kv_heads),
    )
