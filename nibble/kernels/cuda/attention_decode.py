"""Launches attention_decode.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.append_kv import channel_arrays, check_cache
from nibble.kernels.cuda.attention_plan import (
    HEADS_PER_TILE,
    ROWS_PER_PLAN,
    SMALL_SHARED_BYTES,
    has_large_shared_memory,
    max_splits,
    num_counters_of,
)
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import HEAD_DIMS, KV_TYPES, defines, num_query_heads
from nibble.kernels.interface import AttentionBatch, KVChannels
from nibble.kernels.layout import KVLayout

VARIANTS: tuple[Defines, ...] = tuple(
    (("HEAD_DIM", d), ("KV_TYPE", kind)) for d in HEAD_DIMS for kind in KV_TYPES.values()
)

BLOCK = 320  # eight warps that compute, two that copy
SHARED_BYTES = 113 * 1024
COMPUTING = 256


def record_size(head_dim: int) -> int:
    """float32 of a thread block's sums, as attention_decode_results.cuh stores them."""
    return max(1, head_dim // 128) * COMPUTING * 4 + COMPUTING // 2 + HEADS_PER_TILE


def attention_decode(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    batch: AttentionBatch,
    plan: cupy.ndarray,
    layout: KVLayout,
    channels: KVChannels | None = None,
    table: cupy.ndarray | None = None,
    positions: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """table, with the rows' positions: where the same kernel is to rotate q and k and to append k and v. Each row is
    the last token of its sequence, so its slot follows from the batch."""
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    group_size, max_blocks = num_heads // layout.num_kv_heads, batch.block_tables.shape[1]
    head_tiles = layout.num_kv_heads * -(-group_size // HEADS_PER_TILE)
    num_blocks, share_records = _cut(device, layout, min(len(qkv), ROWS_PER_PLAN) * head_tiles, max_splits(max_blocks))
    records = device.empty((num_blocks * share_records, record_size(layout.head_dim)), np.float32)
    out = device.empty((len(qkv), num_heads * layout.head_dim), np.float16)
    kernel = device.kernel("attention_decode", "attention_decode", defines(layout))
    for slice_plan in plan:  # one after the other: they share the memory for partial results
        kernel.launch(
            (num_blocks, 1, 1),
            BLOCK,
            qkv,
            kv_cache,
            batch.block_tables,
            table,
            positions,
            slice_plan,
            records,
            out,
            np.int32(num_counters_of(layout)),
            np.int32(batch.window or 0),
            np.int32(num_heads),
            np.int32(layout.num_kv_heads),
            np.int32(share_records),
            *channel_arrays(channels, layout),
            shared_bytes=SHARED_BYTES if has_large_shared_memory(device) else SMALL_SHARED_BYTES,
        )
    return out


def _cut(device: Device, layout: KVLayout, row_tiles: int, row_splits: int) -> tuple[int, int]:
    """Of at most row_splits splits of each of row_tiles: thread blocks that share them, and records that each needs.

    A thread block's share is at most an eighth longer than if all had the same (attention_decode_work.cuh).
    """
    blocks_per_multiprocessor = 2 if has_large_shared_memory(device) and layout.head_dim <= 128 else 1
    num_blocks = max(1, min(row_tiles * row_splits, blocks_per_multiprocessor * device.num_multiprocessors))
    share_splits = -(-row_tiles * row_splits // num_blocks)
    return num_blocks, min(row_splits, share_splits + share_splits // 8) + 1
