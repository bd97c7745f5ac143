"""Runs every op once on tiny inputs, so that all code is compiled or loaded from the cache."""

from __future__ import annotations

import numpy as np

from nibble.kernels.interface import AttentionBatch, Float16Weight, Int4Weight, Int8Weight, Kernels, KVChannels, Mode
from nibble.kernels.layout import KVDtype, KVLayout, int4_num_bytes
from nibble.kernels.sampling import SamplingBatch

HIDDEN_SIZE = 64
NUM_TOKENS = 3


def warm_up(kernels: Kernels) -> None:
    """Compile or load every kernel of the backend."""
    ids = np.arange(NUM_TOKENS, dtype=np.int32)
    table = Int8Weight(np.zeros((64, HIDDEN_SIZE), np.int8), np.zeros((64, 2), np.float16), 32)
    x = kernels.embedding(ids, table)
    x = kernels.rms_norm(x, np.ones(HIDDEN_SIZE, np.float32), 1e-5)
    packed = np.zeros(int4_num_bytes(4 * HIDDEN_SIZE, HIDDEN_SIZE, 32), np.uint8)
    weight = Int4Weight(packed, 4 * HIDDEN_SIZE, HIDDEN_SIZE, 32)
    half = Float16Weight(np.zeros((64, HIDDEN_SIZE), np.float16))
    kernels.embedding(ids, half)
    narrow_groups = Int8Weight(table.values, np.zeros((64, 4), np.float16), 16)
    for mode in Mode:
        qkv = kernels.int4_linear(x, weight, mode=mode)
        logits = kernels.int8_linear(x, table, mode=mode)
        kernels.int8_linear(x, narrow_groups, mode=mode)
        kernels.float16_linear(x, half, mode=mode)
        for dtype in KVDtype:
            _attend(kernels, qkv, KVLayout(num_kv_heads=1, head_dim=HIDDEN_SIZE, dtype=dtype), mode)
    kernels.silu_and_mul(kernels.gather_rows(qkv, ids))
    ones, zeros = np.ones(NUM_TOKENS, np.float32), np.zeros(NUM_TOKENS, np.float32)
    batch = SamplingBatch(ones, ids, ones, zeros, ids.astype(np.uint64), ids.astype(np.int64))
    kernels.sample(logits, batch)


def _attend(kernels: Kernels, qkv: np.ndarray, layout: KVLayout, mode: Mode) -> None:
    positions = np.arange(NUM_TOKENS, dtype=np.int32)
    table = kernels.rope_table([1.0] * (layout.head_dim // 2), NUM_TOKENS, 1.0)
    kv_cache = kernels.zeros((1, layout.num_kv_heads, layout.head_block_bytes), np.uint8)
    ones = np.ones(layout.head_dim, np.float32)
    channels = None
    if layout.dtype is KVDtype.INT8_CHANNEL:
        channels = KVChannels(np.ones(layout.channels_shape, np.float32), np.zeros(1, np.int64))
    kernels.norm_heads(qkv, ones, ones, 1e-5, layout)
    kernels.rope(qkv, positions, table, layout)
    kernels.append_kv(qkv, positions.astype(np.int64), kv_cache, layout, channels)
    starts, lens = np.array([0, NUM_TOKENS], np.int32), np.array([NUM_TOKENS], np.int32)
    batch = AttentionBatch(starts, lens, np.zeros((1, 1), np.int32))
    kernels.paged_attention(qkv, kv_cache, batch, layout, channels, mode=mode)
