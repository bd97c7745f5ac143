"""Attention of many queries in PREFILL mode where the CPU has AMX: bf16 products, fp32 scores, softmax and sums.

A work item is 32 queries of one sequence and one kv head; it walks the sequence's blocks in order with an online
softmax ("FlashAttention", 2022). A block's keys and values become tiles once for all query heads of the kv head. INT8
scales and zeros stay outside of the products, which then see exact integers (quantization.md): score = k_scale (q . k)
+ k_zero sum(q); the value's scale goes into the weight, its zero is summed apart. What is rounded to bf16 is q and the
weight. Scales of channels go into q and into the result, to which the values' zeros are added; the keys' zeros add the
same to all of a query's scores, which softmax does not see. Blocks lie at fixed positions, so a row's result does not
depend on the chunk.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import amx, memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.kv_tiles import unpack_keys, unpack_parameters, unpack_values
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES
from nibble.kernels.layout import BLOCK_SIZE

QUERIES = 2 * amx.TILE
NUM_ARGUMENTS = 18
MASKED = np.float32(simd.MASKED)
LEAST_SCORE = np.float32(simd.MASKED / 2)
NO_WINDOW = 1 << 40  # more than any context
ROW_STATE = 4  # floats per query and head: largest score, sum of weights, sum of weight * zero, sum of q
BLOCK_ROW_BYTES = BLOCK_SIZE * 4


@inline_jit
def _aligned(buffer):
    return -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES


@inline_jit
def _load_queries(q, row_bytes, count, group, head_dim, channels, rounded, state, totals):
    """Queries / sqrt(D), times the keys' scales, in bf16 (group, 32, D), their sums, and empty totals; rows from
    `count` on are 0."""
    factor = simd.broadcast(np.float32(1) / np.sqrt(np.float32(head_dim)))
    zero = simd.broadcast(np.float32(0))
    for head in range(group):
        for row in range(QUERIES):
            q_sum = zero
            for dim in range(0, head_dim, LANES):
                values = zero
                if row < count:
                    values = memory.load(q + row * row_bytes + (head * head_dim + dim) * 4) * factor
                    if channels:
                        values = values * memory.load(channels + dim * 4)
                amx.store_bfloat16(rounded, values)
                q_sum = q_sum + amx.load_bfloat16(rounded)
                memory.store(totals, zero)
                rounded += LANES * 2
                totals += VECTOR_BYTES
            memory.store_float32(state, MASKED)
            memory.store_float32(state + 4, np.float32(0))
            memory.store_float32(state + 8, np.float32(0))
            memory.store_float32(state + 12, simd.sum_of(q_sum))
            state += ROW_STATE * 4


@inline_jit
def _products(a, a_stride, b, num_steps, num_tiles, out, out_stride):
    """out (32, 16 num_tiles) = A (32 rows) times B, whose steps hold num_tiles tiles each (an even number)."""
    for tile in range(0, num_tiles, 2):
        amx.zero_sums()
        place = b + tile * amx.TILE_BYTES
        for step in range(num_steps):
            amx.multiply_add(a + step * amx.TILE_DEPTH * 2, a_stride, place, place + amx.TILE_BYTES)
            place += num_tiles * amx.TILE_BYTES
        amx.store_sums(out + tile * VECTOR_BYTES, out_stride)


@inline_jit
def _softmax_row(scores, oldest, visible, parameters, state, weights):
    """Turn a row of 64 raw products into weights (bf16, V scale included); updates the row's state.

    Returns what the row's earlier totals shrink by. Tokens before `oldest` and from `visible` on are masked.
    """
    q_sum = simd.broadcast(memory.float32_at(state + 12))
    largest = memory.float32_at(state)
    best = simd.broadcast(MASKED)
    for place in range(0, BLOCK_ROW_BYTES, VECTOR_BYTES):
        zero_part = memory.load(parameters + BLOCK_ROW_BYTES + place) * q_sum
        score = simd.fma(memory.load(scores + place), memory.load(parameters + place), zero_part)
        if place // 4 + LANES > visible:
            score = simd.mask_from(score, visible - place // 4)
        if place // 4 < oldest:
            score = simd.mask_before(score, oldest - place // 4)
        memory.store(scores + place, score)
        best = simd.at_least(score, best)
    new_largest = max(largest, simd.max_of(best))
    top = simd.broadcast(new_largest)
    weight_sum = zero_sum = simd.broadcast(np.float32(0))
    for place in range(0, BLOCK_ROW_BYTES, VECTOR_BYTES):
        score = memory.load(scores + place)
        # A window can hide a whole block, whose largest score is then MASKED itself.
        weight = simd.zero_where_less(score, simd.broadcast(LEAST_SCORE), simd.exp_or_zero(score - top))
        weight_sum = weight_sum + weight
        zero_sum = simd.fma(weight, memory.load(parameters + 3 * BLOCK_ROW_BYTES + place), zero_sum)
        amx.store_bfloat16(weights + place // 2, weight * memory.load(parameters + 2 * BLOCK_ROW_BYTES + place))
    correction = simd.exp(simd.broadcast(largest - new_largest))
    shrink = simd.first_of(correction)
    memory.store_float32(state, new_largest)
    memory.store_float32(state + 4, memory.float32_at(state + 4) * shrink + simd.sum_of(weight_sum))
    memory.store_float32(state + 8, memory.float32_at(state + 8) * shrink + simd.sum_of(zero_sum))
    return correction


@inline_jit
def _block(
    queries, keys, values, parameters, first_visible, window, head_dim, scores, weights, products, state, totals
):
    """One head's 32 queries over one block; the first query sees first_visible of its tokens, the next one more, each
    the last `window` of them."""
    row_bytes = head_dim * 4
    num_tiles = head_dim // amx.TILE
    _products(queries, head_dim * 2, keys, head_dim // amx.TILE_DEPTH, 4, scores, BLOCK_ROW_BYTES)
    for row in range(QUERIES):
        visible = first_visible + row
        row_state = state + row * ROW_STATE * 4
        row_weights = weights + row * BLOCK_SIZE * 2
        row_scores = scores + row * BLOCK_ROW_BYTES
        correction = _softmax_row(row_scores, visible - window, visible, parameters, row_state, row_weights)
        for place in range(row * row_bytes, (row + 1) * row_bytes, VECTOR_BYTES):
            memory.store(totals + place, memory.load(totals + place) * correction)
    _products(weights, BLOCK_SIZE * 2, values, BLOCK_SIZE // amx.TILE_DEPTH, num_tiles, products, row_bytes)
    for place in range(0, QUERIES * row_bytes, VECTOR_BYTES):
        memory.store(totals + place, memory.load(totals + place) + memory.load(products + place))


@inline_jit
def _store(totals, state, count, group, head_dim, channels, out, row_bytes):
    """channels: the values' scales and zeros, or 0."""
    for head in range(group):
        for row in range(QUERIES):
            if row < count:
                weight_sum = simd.broadcast(memory.float32_at(state + 4))
                zero_sum = simd.broadcast(memory.float32_at(state + 8))
                for dim in range(0, head_dim, LANES):
                    value = (memory.load(totals + dim * 4) + zero_sum) / weight_sum
                    if channels:
                        scale, zero = memory.load(channels + dim * 4), memory.load(channels + (head_dim + dim) * 4)
                        value = simd.fma(value, scale, zero)
                    memory.store(out + row * row_bytes + (head * head_dim + dim) * 4, value)
            totals += head_dim * 4
            state += ROW_STATE * 4


@inline_jit
def _item(a, sequence, first_query, head):
    """32 queries (or what is left) of a sequence, from its first_query on, for one kv head."""
    group, head_dim, is_float16 = a[7], a[8], a[9]
    start, stop = memory.int32_at(a[2] + sequence * 4), memory.int32_at(a[2] + (sequence + 1) * 4)
    count = min(QUERIES, stop - start - first_query)
    first_row = start + first_query
    context_len = memory.int32_at(a[3] + sequence * 4)
    first_position = context_len - (stop - start) + first_query
    pairs = group * QUERIES
    buffer = np.empty(pairs * (head_dim * 6 + ROW_STATE * 4) + BLOCK_SIZE * head_dim * 4 + VECTOR_BYTES, np.uint8)
    totals = _aligned(buffer)
    queries = totals + pairs * head_dim * 4
    keys = queries + pairs * head_dim * 2
    values = keys + BLOCK_SIZE * head_dim * 2
    state = values + BLOCK_SIZE * head_dim * 2
    scratch = np.empty(QUERIES * (BLOCK_ROW_BYTES + BLOCK_SIZE * 2 + head_dim * 4) + 4 * BLOCK_ROW_BYTES + 64, np.uint8)
    scores = _aligned(scratch)
    weights = scores + QUERIES * BLOCK_ROW_BYTES
    products = weights + QUERIES * BLOCK_SIZE * 2
    parameters = products + QUERIES * head_dim * 4
    q = a[0] + first_row * a[1] + head * group * head_dim * 4
    key_channels = a[17] + head * 4 * head_dim * 4 if a[17] else 0
    value_channels = key_channels + 2 * head_dim * 4 if a[17] else 0
    _load_queries(q, a[1], count, group, head_dim, key_channels, queries, state, totals)
    oldest = max(0, first_position + 1 - a[16])
    for first_token in range(oldest // BLOCK_SIZE * BLOCK_SIZE, first_position + count, BLOCK_SIZE):
        block = memory.int32_at(a[4] + (sequence * a[5] + first_token // BLOCK_SIZE) * 4)
        keys_at = a[10] + (block * a[6] + head) * a[11]
        block_bytes = BLOCK_SIZE * head_dim * (2 if is_float16 else 1)
        tokens = min(BLOCK_SIZE, context_len - first_token)
        unpack_keys(keys_at, head_dim, is_float16, keys)
        unpack_values(keys_at + block_bytes, head_dim, tokens, is_float16, values)
        unpack_parameters(keys_at + 2 * block_bytes, tokens, is_float16 == 0 and a[17] == 0, parameters)
        for h in range(group):
            _block(
                queries + h * QUERIES * head_dim * 2,
                keys,
                values,
                parameters,
                first_position + 1 - first_token,
                a[16],
                head_dim,
                scores,
                weights,
                products,
                state + h * QUERIES * ROW_STATE * 4,
                totals + h * QUERIES * head_dim * 4,
            )
    out = a[13] + first_row * a[14] + head * group * head_dim * 4
    _store(totals, state, count, group, head_dim, value_channels, out, a[14])
    memory.keep_alive(buffer)
    memory.keep_alive(scratch)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    item, head = chunk // a[6], chunk % a[6]
    amx.configure(a[15])
    _item(a, memory.int32_at(a[12] + item * 8), memory.int32_at(a[12] + item * 8 + 4), head)
    amx.release()


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def tile_attention(
    pool,
    function,
    config,
    qkv,
    kv_cache,
    query_starts,
    context_lens,
    block_tables,
    window,
    num_kv_heads,
    head_dim,
    is_float16,
    channels,
    out,
):
    """As `paged_attention.paged_attention`; config is `amx.tile_config`'s."""
    num_sequences = len(context_lens)
    num_items = 0
    for s in range(num_sequences):
        num_items += (query_starts[s + 1] - query_starts[s] + QUERIES - 1) // QUERIES
    items = np.empty((num_items, 2), np.int32)  # (sequence, first query)
    item = 0
    for s in range(num_sequences):
        for first_query in range(0, query_starts[s + 1] - query_starts[s], QUERIES):
            items[item, 0], items[item, 1] = s, first_query
            item += 1
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = qkv.ctypes.data, qkv.shape[1] * 4, query_starts.ctypes.data, context_lens.ctypes.data
    a[4], a[5], a[6] = block_tables.ctypes.data, block_tables.shape[1], num_kv_heads
    a[7], a[8], a[9] = out.shape[1] // head_dim // num_kv_heads, head_dim, is_float16
    a[10], a[11], a[12] = kv_cache.ctypes.data, kv_cache.shape[2], items.ctypes.data
    a[13], a[14], a[15] = out.ctypes.data, out.shape[1] * 4, config.ctypes.data
    a[16], a[17] = window if window else NO_WINDOW, channels
    run_job(pool, function, a.ctypes.data, num_items * num_kv_heads)
    memory.keep_alive(items)
    memory.keep_alive(a)
