"""Launches attention_plan.cu, and says how work and the memory for it are cut, as attention_plan.cuh tells the kernels.

Nothing here looks at the device's data: grids and buffers follow from shapes alone, kernels read how much there is to
do from the plan. Rows of a decoding step are cut into slices of ROWS_PER_PLAN, so that the memory for partial results
stays bounded when a sequence's generated tokens are computed anew, thousands at a time.
"""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.rope import MAX_GROUP_SIZE
from nibble.kernels.interface import AttentionBatch, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVLayout

VARIANTS: tuple[Defines, ...] = ((),)

# As in attention_plan.cuh
SPLIT_TOKENS = 256
MAX_SPLITS = 32
ROWS_PER_PLAN = 256
HEADER = 4  # int32
SPLIT_ENTRY = 4  # int32
TILE_ENTRY = 4  # int32
BLOCK = 1024

HEADS_PER_TILE = 8  # query heads of one kv head that attention_decode.cu takes together

# A100, H100 and their like have more shared memory than 99 KB per thread block, and get larger tiles
LARGE_SHARED_BYTES = 160 * 1024
SMALL_SHARED_BYTES = 99 * 1024


def plan_attention(
    device: Device, batch: AttentionBatch, layout: KVLayout, num_tokens: int, mode: Mode
) -> cupy.ndarray:
    """See `Kernels.plan_attention`. int32, each row a plan of attention_plan.cuh: for a slice of a decoding step's
    query rows, or for each possible number of query heads per kv head of a prompt step."""
    assert batch.window is None or batch.window > 0, f"the window is {batch.window}"
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
    num_counters = num_counters_of(layout)
    size = HEADER + num_counters + rows * max_splits(max_blocks) * SPLIT_ENTRY
    plan = device.empty((num_slices, size), np.int32)
    device.kernel("attention_plan", "plan_decode").launch(
        (num_slices, 1, 1),
        BLOCK,
        batch.query_starts,
        batch.context_lens,
        np.int32(num_sequences),
        np.int32(num_tokens),
        np.int32(max_blocks),
        np.int32(batch.window or 0),
        np.int32(num_counters),
        np.int32(size),
        plan,
    )
    return plan


def _plan_prefill(device: Device, batch: AttentionBatch, layout: KVLayout, num_tokens: int) -> cupy.ndarray:
    """How many tokens a tile has depends on how many query heads share its rows, which the plan does not know: one
    plan for each number."""
    num_sequences, tile_rows = len(batch.context_lens), tile_rows_of(device, layout)
    size = HEADER + (num_tokens // (tile_rows // MAX_GROUP_SIZE) + num_sequences) * TILE_ENTRY
    plan = device.empty((MAX_GROUP_SIZE, size), np.int32)
    device.kernel("attention_plan", "plan_prefill").launch(
        (MAX_GROUP_SIZE, 1, 1),
        BLOCK,
        batch.query_starts,
        batch.context_lens,
        np.int32(num_sequences),
        np.int32(tile_rows),
        np.int32(size),
        plan,
    )
    return plan


def has_large_shared_memory(device: Device) -> bool:
    return device.max_shared_bytes >= LARGE_SHARED_BYTES


def max_splits(max_blocks: int) -> int:
    """Of any row whose block table has max_blocks columns."""
    return max(1, min(MAX_SPLITS, -(-max_blocks * BLOCK_SIZE // SPLIT_TOKENS)))


def num_counters_of(layout: KVLayout) -> int:
    """Of a slice: one per row, kv head and tile of query heads, of which a kv head has at most two."""
    return ROWS_PER_PLAN * layout.num_kv_heads * (MAX_GROUP_SIZE // HEADS_PER_TILE)


def prefill_block(device: Device, layout: KVLayout) -> int:
    return 128 if layout.head_dim > 128 and not has_large_shared_memory(device) else 256


def tile_rows_of(device: Device, layout: KVLayout) -> int:
    """(query token, head) rows of a prefill thread block: a warp has 16 or 32."""
    is_large = layout.head_dim <= 128 and has_large_shared_memory(device)
    return prefill_block(device, layout) // 32 * (32 if is_large else 16)
