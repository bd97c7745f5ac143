"""Launches attention: its plan, one kernel per layer for decoding, two for prompts.

Nothing here looks at the device's data: grids and buffers follow from shapes alone, kernels read how much there is to
do from the plan. Rows of a decoding step are cut into slices of ROWS_PER_PLAN, so that the memory for partial results
stays bounded when a sequence's generated tokens are computed anew, thousands at a time.
"""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.append_kv import check_cache, rope_append_kv
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import HEAD_DIMS, MAX_GROUP_SIZE, check_table, defines, num_query_heads
from nibble.kernels.interface import AttentionBatch, AttentionStep, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVLayout

_LAYOUTS: tuple[Defines, ...] = tuple((("HEAD_DIM", d), ("KV_FP16", f)) for d in HEAD_DIMS for f in (0, 1))
VARIANTS = {"attention_plan": ((),), "attention_decode": _LAYOUTS, "attention_prefill": _LAYOUTS}

# As in attention_plan.cuh
SPLIT_TOKENS = 256
MAX_SPLITS = 32
ROWS_PER_PLAN = 256
PLAN_HEADER = 4  # int32
SPLIT_ENTRY = 12  # int32
TILE_ENTRY = 4  # int32
PLAN_BLOCK = 1024

# As in attention_decode.cu
HEADS_PER_TILE = 8
DECODE_BLOCK = 288
DECODE_BLOCKS_PER_MULTIPROCESSOR = 2
DECODE_SHARED_BYTES = 113 * 1024

# As in attention_prefill.cu
PREFILL_SHARED_BYTES = 160 * 1024

# A100, H100 and their like have more shared memory than 99 KB per thread block, and get larger tiles
SMALL_SHARED_BYTES = 99 * 1024


def plan_attention(
    device: Device, batch: AttentionBatch, layout: KVLayout, num_tokens: int, mode: Mode
) -> cupy.ndarray:
    """See `Kernels.plan_attention`. int32, each row a plan of attention_plan.cuh: for a slice of a decoding step's
    query rows, or for each possible number of query heads per kv head of a prompt step."""
    num_sequences, max_blocks = batch.block_tables.shape
    for name, array, length in (
        ("query_starts", batch.query_starts, num_sequences + 1),
        ("context_lens", batch.context_lens, num_sequences),
    ):
        assert (array.shape, array.dtype) == ((length,), np.int32), f"{name} must be int32 ({length},)"
    assert batch.block_tables.dtype == np.int32, "block_tables must be int32"
    if mode is Mode.PREFILL:
        return _plan_prefill(device, batch, layout, num_tokens)
    num_slices, rows = -(-num_tokens // ROWS_PER_PLAN), min(num_tokens, ROWS_PER_PLAN)
    num_counters = _num_counters(layout)
    size = PLAN_HEADER + num_counters + rows * _max_splits(max_blocks) * SPLIT_ENTRY
    plan = device.empty((num_slices, size), np.int32)
    device.kernel("attention_plan", "plan_decode").launch(
        (num_slices, 1, 1),
        PLAN_BLOCK,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        np.int32(max_blocks),
        np.int32(num_sequences),
        np.int32(num_tokens),
        np.int32(num_counters),
        np.int32(size),
        plan,
    )
    return plan


def attention(
    device: Device, qkv: cupy.ndarray, kv_cache: cupy.ndarray, step: AttentionStep, layout: KVLayout, mode: Mode
) -> cupy.ndarray:
    """See `Kernels.attention`. One kernel where each sequence has one query and decodes, otherwise two."""
    assert step.plan is not None, "attention needs the plan of plan_attention"
    if mode is Mode.DECODE and len(qkv) == len(step.batch.context_lens):
        assert (step.slots.shape, step.slots.dtype) == ((len(qkv),), np.int64), "slots must be int64 (T,)"
        assert (step.positions.shape, step.positions.dtype) == ((len(qkv),), np.int32), "positions must be int32 (T,)"
        check_table(step.rope_table, layout)
        return _decode(device, qkv, kv_cache, step.batch, step.plan, layout, step.rope_table)
    rope_append_kv(device, qkv, step.positions, step.slots, step.rope_table, kv_cache, layout)
    attend = _decode if mode is Mode.DECODE else _prefill
    return attend(device, qkv, kv_cache, step.batch, step.plan, layout)


def paged_attention(
    device: Device, qkv: cupy.ndarray, kv_cache: cupy.ndarray, batch: AttentionBatch, layout: KVLayout, mode: Mode
) -> cupy.ndarray:
    """See `Kernels.paged_attention`."""
    plan = plan_attention(device, batch, layout, len(qkv), mode)
    attend = _decode if mode is Mode.DECODE else _prefill
    return attend(device, qkv, kv_cache, batch, plan, layout)


def _decode(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    batch: AttentionBatch,
    plan: cupy.ndarray,
    layout: KVLayout,
    table: cupy.ndarray | None = None,
) -> cupy.ndarray:
    """table: where the same kernel is to rotate q and k and to append k and v: each row is the last token of its
    sequence, so its position and its slot follow from the batch."""
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    group_size, max_blocks = num_heads // layout.num_kv_heads, batch.block_tables.shape[1]
    item_heads = layout.num_kv_heads * -(-group_size // HEADS_PER_TILE)
    num_splits = min(len(qkv), ROWS_PER_PLAN) * _max_splits(max_blocks)
    partial_rows = num_splits * item_heads * min(group_size, HEADS_PER_TILE)
    sums = device.empty((partial_rows, layout.head_dim), np.float32)
    stats = device.empty((partial_rows, 2), np.float32)
    out = device.empty((len(qkv), num_heads * layout.head_dim), np.float16)
    most_blocks = DECODE_BLOCKS_PER_MULTIPROCESSOR * device.num_multiprocessors
    kernel = device.kernel("attention_decode", "attention_decode", defines(layout))
    for slice_plan in plan:  # one after the other: they share the memory for partial results
        kernel.launch(
            (min(num_splits * item_heads, most_blocks), 1, 1),
            DECODE_BLOCK,
            qkv,
            kv_cache,
            batch.block_tables,
            table,
            slice_plan,
            sums,
            stats,
            out,
            np.int32(_num_counters(layout)),
            np.int32(max_blocks),
            np.int32(num_heads),
            np.int32(layout.num_kv_heads),
            shared_bytes=DECODE_SHARED_BYTES if _has_large_shared_memory(device) else SMALL_SHARED_BYTES,
        )
    return out


def _plan_prefill(device: Device, batch: AttentionBatch, layout: KVLayout, num_tokens: int) -> cupy.ndarray:
    """How many tokens a tile has depends on how many query heads share its rows, which the plan does not know: one
    plan for each number."""
    num_sequences, tile_rows = len(batch.context_lens), _tile_rows(device, layout)
    size = PLAN_HEADER + (num_tokens // (tile_rows // MAX_GROUP_SIZE) + num_sequences) * TILE_ENTRY
    plan = device.empty((MAX_GROUP_SIZE, size), np.int32)
    device.kernel("attention_plan", "plan_prefill").launch(
        (MAX_GROUP_SIZE, 1, 1),
        PLAN_BLOCK,
        batch.query_starts,
        batch.context_lens,
        np.int32(num_sequences),
        np.int32(tile_rows),
        np.int32(size),
        plan,
    )
    return plan


def _prefill(
    device: Device,
    qkv: cupy.ndarray,
    kv_cache: cupy.ndarray,
    batch: AttentionBatch,
    plan: cupy.ndarray,
    layout: KVLayout,
) -> cupy.ndarray:
    num_heads = num_query_heads(qkv, layout)
    check_cache(kv_cache, layout)
    group_size = num_heads // layout.num_kv_heads
    num_tiles = len(qkv) // (_tile_rows(device, layout) // group_size) + len(batch.context_lens)
    out = device.empty((len(qkv), num_heads * layout.head_dim), np.float16)
    kernel = device.kernel("attention_prefill", "attention_prefill", defines(layout))
    kernel.launch(
        (num_tiles * layout.num_kv_heads, 1, 1),
        _prefill_block(device, layout),
        qkv,
        kv_cache,
        batch.block_tables,
        plan[group_size - 1],
        out,
        np.int32(batch.block_tables.shape[1]),
        np.int32(num_heads),
        np.int32(layout.num_kv_heads),
        shared_bytes=PREFILL_SHARED_BYTES if _has_large_shared_memory(device) else SMALL_SHARED_BYTES,
    )
    return out


def _has_large_shared_memory(device: Device) -> bool:
    return device.max_shared_bytes >= PREFILL_SHARED_BYTES


def _max_splits(max_blocks: int) -> int:
    """Of any row whose block table has max_blocks columns."""
    return max(1, min(MAX_SPLITS, -(-max_blocks * BLOCK_SIZE // SPLIT_TOKENS)))


def _num_counters(layout: KVLayout) -> int:
    """Of a slice: one per row, kv head and tile of query heads, of which a kv head has at most two."""
    return ROWS_PER_PLAN * layout.num_kv_heads * (MAX_GROUP_SIZE // HEADS_PER_TILE)


def _prefill_block(device: Device, layout: KVLayout) -> int:
    return 128 if layout.head_dim > 128 and not _has_large_shared_memory(device) else 256


def _tile_rows(device: Device, layout: KVLayout) -> int:
    """(query token, head) rows of a prefill thread block: a warp has 16 or 32."""
    is_large = layout.head_dim <= 128 and _has_large_shared_memory(device)
    return _prefill_block(device, layout) // 32 * (32 if is_large else 16)
