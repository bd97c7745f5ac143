"""Attention of each query over its sequence's blocks in DECODE mode: split over the context, then combined.

The work is cut into (query row, kv head, split of SPLIT_TOKENS positions). All query heads of a kv head share the
dequantised keys and values of 16 tokens at a time; softmax is online, block by block (Milakov and Gimelshein, 2018),
and the splits are combined in order ("Flash-Decoding", 2023). Splits lie at fixed positions and every row is computed
by itself, so that results are batch-invariant bit for bit. Keys, values, softmax and sums are fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import (
    F32,
    F32X16,
    LANES,
    VECTOR_BYTES,
    call_fma,
    load_at,
    splat,
    unpack_tuple,
    vector,
)
from nibble.kernels.layout import BLOCK_SIZE

SPLIT_TOKENS = 4 * BLOCK_SIZE
TOKENS = LANES  # tokens whose scores make one vector
NUM_ARGUMENTS = 17
PARAMETER_BYTES = 4  # (scale, zero) fp16
MASKED = np.float32(simd.MASKED)


@intrinsic
def dot_products(typingctx: Any, sums: Any, q: Any, address: Any, stride: Any) -> Any:
    """sums[t] + q * the 16 floats at address + t * stride, lane by lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = unpack_tuple(builder, args[0], len(sums))
        place = args[2]
        for t in range(len(sums)):
            accumulators[t] = call_fma(builder, args[1], load_at(builder, place, F32X16, align=4), accumulators[t])
            place = builder.add(place, args[3])
        return context.make_tuple(builder, sums, accumulators)

    return sums(sums, vector, types.intp, types.intp), codegen


@intrinsic
def weighted_sums(typingctx: Any, sums: Any, weights: Any, address: Any, stride: Any) -> Any:
    """sums (4 vectors) + 16 tokens' 32 floats at address, stride bytes apart, times their weights (float32 at weights).

    Even and odd tokens are added apart (vectors 0, 1 and 2, 3), so that additions do not wait for each other.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = unpack_tuple(builder, args[0], len(sums))
        place = args[2]
        for t in range(TOKENS):
            weight = splat(builder, load_at(builder, args[1], F32, 4 * t))
            for half in range(2):
                values = load_at(builder, place, F32X16, half * VECTOR_BYTES, align=4)
                i = 2 * (t % 2) + half
                accumulators[i] = call_fma(builder, weight, values, accumulators[i])
            place = builder.add(place, args[3])
        return context.make_tuple(builder, sums, accumulators)

    return sums(sums, types.intp, types.intp, types.intp), codegen


@inline_jit
def _dequantize(values, parameters, count, head_dim, is_float16, channels, out):
    """out fp32 (16, D) = `count` tokens of K or V; the others are zero. All addresses.

    channels: of their scales, then their zeros, or 0.
    """
    for t in range(count):
        if is_float16:
            for i in range(0, head_dim, LANES):
                memory.store(out + i * 4, memory.load_float16(values + i * 2))
            values += head_dim * 2
        elif channels:
            for i in range(0, head_dim, LANES):
                scale, zero = memory.load(channels + i * 4), memory.load(channels + (head_dim + i) * 4)
                memory.store(out + i * 4, simd.fma(memory.load_int8(values + i), scale, zero))
            values += head_dim
        else:
            scale = simd.broadcast(memory.float16_at(parameters + t * PARAMETER_BYTES))
            zero = simd.broadcast(memory.float16_at(parameters + t * PARAMETER_BYTES + 2))
            for i in range(0, head_dim, LANES):
                memory.store(out + i * 4, simd.fma(memory.load_int8(values + i), scale, zero))
            values += head_dim
        out += head_dim * 4
    for _ in range(0, (TOKENS - count) * head_dim, LANES):
        memory.store(out, simd.broadcast(np.float32(0)))
        out += VECTOR_BYTES


@inline_jit
def _scores(q, keys, group, head_dim, scores):
    """Each head's 16 scores over 16 dequantised keys; a head's row of scores is a block's, 64 floats."""
    row_bytes = head_dim * 4
    for head in range(group):
        sums = simd.zeros(TOKENS)
        for place in range(0, row_bytes, VECTOR_BYTES):
            sums = dot_products(sums, memory.load(q + head * row_bytes + place), keys + place, row_bytes)
        memory.store(scores + head * BLOCK_SIZE * 4, simd.sum_all(sums))


@inline_jit
def _softmax(scores, first, count, group, head_dim, partial):
    """Turn each head's scores of a block's tokens from `first` to `count` into weights, 0 before them; updates its
    partial's maximum and sum."""
    row_bytes = head_dim * 4
    for _ in range(group):
        best = simd.broadcast(MASKED)
        for t in range(0, count, TOKENS):
            score = simd.mask_before(simd.mask_from(memory.load(scores + t * 4), count - t), first - t)
            memory.store(scores + t * 4, score)
            best = simd.at_least(score, best)
        largest = memory.float32_at(partial + row_bytes)
        new_largest = max(largest, simd.max_of(best))
        total = simd.broadcast(np.float32(0))
        for t in range(0, count, TOKENS):
            weight = simd.exp_or_zero(memory.load(scores + t * 4) - simd.broadcast(new_largest))
            memory.store(scores + t * 4, weight)
            total = total + weight
        correction = simd.exp(simd.broadcast(largest - new_largest))
        old_total = memory.float32_at(partial + row_bytes + 4) * simd.first_of(correction)
        memory.store_float32(partial + row_bytes, new_largest)
        memory.store_float32(partial + row_bytes + 4, old_total + simd.sum_of(total))
        for place in range(0, row_bytes, VECTOR_BYTES):
            memory.store(partial + place, memory.load(partial + place) * correction)
        scores += BLOCK_SIZE * 4
        partial += row_bytes + VECTOR_BYTES


@inline_jit
def _add_values(weights, values, group, head_dim, partial):
    """Add 16 dequantised values, times each head's weights, to its partial."""
    row_bytes = head_dim * 4
    for _ in range(group):
        for place in range(0, row_bytes, 2 * VECTOR_BYTES):
            sums = weighted_sums(simd.zeros(4), weights, values + place, row_bytes)
            memory.store(partial + place, memory.load(partial + place) + (sums[0] + sums[2]))
            high = partial + place + VECTOR_BYTES
            memory.store(high, memory.load(high) + (sums[1] + sums[3]))
        weights += BLOCK_SIZE * 4
        partial += row_bytes + VECTOR_BYTES


@inline_jit
def _block(q, head_block, first, count, group, head_dim, is_float16, channels, scratch, scores, partial):
    """One query row's `group` heads over the tokens from `first` to `count` of a block."""
    value_channels = channels + 2 * head_dim * 4 if channels else 0
    token_bytes = head_dim * 2 if is_float16 else head_dim
    parameters = head_block + 2 * BLOCK_SIZE * head_dim
    for t in range(0, count, TOKENS):
        tokens = min(TOKENS, count - t)
        place = parameters + t * PARAMETER_BYTES
        _dequantize(head_block + t * token_bytes, place, tokens, head_dim, is_float16, channels, scratch)
        _scores(q, scratch, group, head_dim, scores + t * 4)
    _softmax(scores, first, count, group, head_dim, partial)
    for t in range(0, count, TOKENS):
        tokens = min(TOKENS, count - t)
        place = parameters + (BLOCK_SIZE + t) * PARAMETER_BYTES
        values = head_block + (BLOCK_SIZE + t) * token_bytes
        _dequantize(values, place, tokens, head_dim, is_float16, value_channels, scratch)
        _add_values(scores + t * 4, scratch, group, head_dim, partial)


@inline_jit
def _split(a, row, split, head):
    """One work item: fills its partial. `split` counts from position 0."""
    visible = memory.int32_at(a[3] + row * 4)
    oldest = _oldest(visible, a[15])
    sequence = memory.int32_at(a[2] + row * 4)
    group, head_dim, is_float16 = a[7], a[8], a[9]
    buffer = np.empty((group + TOKENS) * head_dim * 4 + group * BLOCK_SIZE * 4 + VECTOR_BYTES, np.uint8)
    scratch = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    scores = scratch + TOKENS * head_dim * 4
    scaled_q = scores + group * BLOCK_SIZE * 4
    factor = simd.broadcast(np.float32(1) / np.sqrt(np.float32(head_dim)))
    q = a[0] + row * a[1] + head * group * head_dim * 4
    for place in range(0, group * head_dim * 4, VECTOR_BYTES):
        memory.store(scaled_q + place, memory.load(q + place) * factor)
    item = memory.int64_at(a[12] + row * 8) + split - oldest // SPLIT_TOKENS
    partial = a[13] + (item * a[6] + head) * group * (head_dim * 4 + VECTOR_BYTES)
    _start(partial, group, head_dim)
    channels = a[16] + head * 4 * head_dim * 4 if a[16] else 0
    start = max(split * SPLIT_TOKENS, oldest // BLOCK_SIZE * BLOCK_SIZE)
    for token in range(start, min((split + 1) * SPLIT_TOKENS, visible), BLOCK_SIZE):
        block = memory.int32_at(a[4] + (sequence * a[5] + token // BLOCK_SIZE) * 4)
        head_block = a[10] + (block * a[6] + head) * a[11]
        count = min(BLOCK_SIZE, visible - token)
        first = oldest - token
        _block(scaled_q, head_block, first, count, group, head_dim, is_float16, channels, scratch, scores, partial)
    memory.keep_alive(buffer)


@inline_jit
def _oldest(visible, window):
    """The first position that a row sees of the `visible` ones up to its own; window 0: the first of all."""
    return max(0, visible - window) if window else 0


@inline_jit
def _start(partial, group, head_dim):
    for _ in range(group):
        for _ in range(0, head_dim, LANES):
            memory.store(partial, simd.broadcast(np.float32(0)))
            partial += VECTOR_BYTES
        memory.store_float32(partial, MASKED)
        memory.store_float32(partial + 4, np.float32(0))
        partial += VECTOR_BYTES


@inline_jit
def _combine(partial, num_splits, split_bytes, head_dim, out):
    """out (D,) of one row and query head from its splits, in their order."""
    largest = MASKED
    for split in range(num_splits):
        largest = max(largest, memory.float32_at(partial + split * split_bytes + head_dim * 4))
    total = simd.broadcast(np.float32(0))
    for place in range(0, head_dim * 4, VECTOR_BYTES):
        memory.store(out + place, total)
    for split in range(num_splits):
        source = partial + split * split_bytes
        correction = simd.exp(simd.broadcast(memory.float32_at(source + head_dim * 4) - largest))
        total = simd.fma(simd.broadcast(memory.float32_at(source + head_dim * 4 + 4)), correction, total)
        for place in range(0, head_dim * 4, VECTOR_BYTES):
            memory.store(out + place, simd.fma(memory.load(source + place), correction, memory.load(out + place)))
    for place in range(0, head_dim * 4, VECTOR_BYTES):
        memory.store(out + place, memory.load(out + place) / total)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    item, head = chunk // a[6], chunk % a[6]
    row = memory.int32_at(a[14] + item * 4)
    first_split = _oldest(memory.int32_at(a[3] + row * 4), a[15]) // SPLIT_TOKENS
    _split(a, row, first_split + item - memory.int64_at(a[12] + row * 8), head)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@inline_jit
def _rows_of(query_starts, context_lens, row_sequence, row_visible):
    """Each query row's sequence and number of visible tokens."""
    for s in range(len(context_lens)):
        start, stop = query_starts[s], query_starts[s + 1]
        for row in range(start, stop):
            row_sequence[row] = s
            row_visible[row] = context_lens[s] - (stop - row) + 1


@kernel_jit
def paged_attention(
    pool,
    function,
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
    """out (T, num_heads * D); kv_cache uint8 (num_blocks, num_kv_heads, bytes); window 0: none.

    channels: the address of their parameters, or 0.
    """
    num_rows, num_heads = out.shape[0], out.shape[1] // head_dim
    row_sequence, row_visible = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
    _rows_of(query_starts, context_lens, row_sequence, row_visible)
    first_item = np.zeros(num_rows + 1, np.int64)
    for row in range(num_rows):
        first_split = _oldest(row_visible[row], window) // SPLIT_TOKENS
        num_splits = (row_visible[row] + SPLIT_TOKENS - 1) // SPLIT_TOKENS - first_split
        first_item[row + 1] = first_item[row] + num_splits
    num_items = first_item[num_rows]
    item_row = np.empty(num_items, np.int32)
    for row in range(num_rows):
        item_row[first_item[row] : first_item[row + 1]] = row
    group = num_heads // num_kv_heads
    head_bytes = head_dim * 4 + VECTOR_BYTES
    partials = np.empty(num_items * num_heads * head_bytes, np.uint8)
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = qkv.ctypes.data, qkv.shape[1] * 4, row_sequence.ctypes.data, row_visible.ctypes.data
    a[4], a[5], a[6], a[7] = block_tables.ctypes.data, block_tables.shape[1], num_kv_heads, group
    a[8], a[9], a[10], a[11] = head_dim, is_float16, kv_cache.ctypes.data, kv_cache.shape[2]
    a[12], a[13], a[14], a[15] = first_item.ctypes.data, partials.ctypes.data, item_row.ctypes.data, window
    a[16] = channels
    run_job(pool, function, a.ctypes.data, num_items * num_kv_heads)
    for row in range(num_rows):
        for head in range(num_heads):
            partial = partials.ctypes.data + (first_item[row] * num_heads + head) * head_bytes
            num_splits = first_item[row + 1] - first_item[row]
            target = out.ctypes.data + (row * num_heads + head) * head_dim * 4
            _combine(partial, num_splits, num_heads * head_bytes, head_dim, target)
    memory.keep_alive(row_sequence)
    memory.keep_alive(row_visible)
    memory.keep_alive(item_row)
    memory.keep_alive(a)
