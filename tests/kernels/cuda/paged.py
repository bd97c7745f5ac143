"""Random sequences in a paged cache, for the tests of attention."""

from __future__ import annotations

import numpy as np

from nibble.kernels.interface import AttentionBatch
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout

UNDEFINED_BLOCK = 10**9  # past a table's end: whoever reads through it crashes


def random_cache(rng: np.random.Generator, num_blocks: int, layout: KVLayout) -> np.ndarray:
    """Keys and values of magnitude about 1, at most 4."""
    if layout.dtype is KVDtype.FP16:
        shape = (num_blocks, layout.num_kv_heads, layout.head_block_bytes // 2)
        return np.clip(rng.standard_normal(shape), -4, 4).astype(np.float16).view(np.uint8)
    cache = np.empty((num_blocks, layout.num_kv_heads, layout.head_block_bytes), np.uint8)
    values = 2 * BLOCK_SIZE * layout.head_dim
    cache[..., :values] = rng.integers(0, 256, cache[..., :values].shape, np.uint8)
    if layout.dtype is KVDtype.INT8_CHANNEL:
        return cache
    parameters = np.empty((num_blocks, layout.num_kv_heads, 2 * BLOCK_SIZE, 2), np.float16)
    parameters[..., 0] = rng.uniform(0.004, 0.024, parameters.shape[:-1])
    parameters[..., 1] = rng.uniform(-0.9, 0.9, parameters.shape[:-1])
    cache[..., values:] = parameters.view(np.uint8).reshape(*cache.shape[:2], -1)
    return cache


def poison_slots(cache: np.ndarray, block: int, first: int, layout: KVLayout) -> None:
    """0xFF in slots first .. 63 of a block: NaN as fp16."""
    row = layout.head_dim * (2 if layout.dtype is KVDtype.FP16 else 1)
    for which in range(2):
        start = which * BLOCK_SIZE * row
        cache[block, :, start + first * row : start + BLOCK_SIZE * row] = 0xFF
        if layout.dtype is KVDtype.INT8:
            start = 2 * BLOCK_SIZE * row + which * BLOCK_SIZE * 4
            cache[block, :, start + first * 4 : start + BLOCK_SIZE * 4] = 0xFF


def sequences(
    rng: np.random.Generator, context_lens: list[int], layout: KVLayout, spare_columns: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """(kv_cache, block_tables) of sequences in permuted blocks, all that is not theirs poisoned."""
    counts = [-(-length // BLOCK_SIZE) for length in context_lens]
    blocks = rng.permutation(sum(counts) + 3).astype(np.int32)
    cache = random_cache(rng, len(blocks), layout)
    tables = np.full((len(counts), max(counts) + spare_columns), UNDEFINED_BLOCK, np.int32)
    used = 0
    for s, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        tables[s, :count] = blocks[used : used + count]
        used += count
        if length % BLOCK_SIZE:
            poison_slots(cache, tables[s, count - 1], length % BLOCK_SIZE, layout)
    for block in blocks[used:]:
        poison_slots(cache, block, 0, layout)
    return cache, tables


def attention_batch(query_lens: list[int], context_lens: list[int], tables: np.ndarray) -> AttentionBatch:
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    return AttentionBatch(starts, np.array(context_lens, np.int32), tables)


def slots_of(batch: AttentionBatch) -> tuple[np.ndarray, np.ndarray]:
    """(positions int32, slots int64) of a batch's query tokens."""
    positions, slots = [], []
    for s, context_len in enumerate(batch.context_lens):
        count = batch.query_starts[s + 1] - batch.query_starts[s]
        p = np.arange(context_len - count, context_len)
        positions.append(p)
        slots.append(batch.block_tables[s, p // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + p % BLOCK_SIZE)
    return np.concatenate(positions).astype(np.int32), np.concatenate(slots)
