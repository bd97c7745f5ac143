"""Launches attention_prefill.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.append_kv import channel_arrays, check_cache
from nibble.kernels.cuda.attention_plan import (
    LARGE_SHARED_BYTES,
    SMALL_SHARED_BYTES,
    has_large_shared_memory,
    prefill_block,
    tile_rows_of,
)
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import HEAD_DIMS, KV_TYPES, defines, num_query_heads
from nibble.kernels.interface import AttentionBatch, KVChannels
from nibble.kernels.layout import KVLayout

VARIANTS: tuple[Defines, ...] = tuple(
    (("HEAD_DIM", d), ("KV_TYPE", kind), ("WINDOW", w)) for d in HEAD_DIMS for kind in KV_TYPES.values() for w in (0, 1)
)


def attention_prefill(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    batch: AttentionBatch,
    plan: cupy.ndarray,
    layout: KVLayout,
    channels: KVChannels | None = None,
) -> cupy.ndarray:
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    group_size = num_heads // layout.num_kv_heads
    num_tiles = len(qkv) // (tile_rows_of(device, layout) // group_size) + len(batch.context_lens)
    out = device.empty((len(qkv), num_heads * layout.head_dim), np.float16)
    variant = (*defines(layout), ("WINDOW", int(batch.window is not None)))
    kernel = device.kernel("attention_prefill", "attention_prefill", variant)
    kernel.launch(
        (num_tiles * layout.num_kv_heads, 1, 1),
        prefill_block(device, layout),
        qkv,
        kv_cache,
        batch.block_tables,
        plan[group_size - 1],
        out,
        np.int32(batch.block_tables.shape[1]),
        np.int32(batch.window or 0),
        np.int32(num_heads),
        np.int32(layout.num_kv_heads),
        channel_arrays(channels, layout)[0],
        shared_bytes=LARGE_SHARED_BYTES if has_large_shared_memory(device) else SMALL_SHARED_BYTES,
    )
    return out
