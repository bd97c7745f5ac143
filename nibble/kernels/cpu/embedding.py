"""Rows of an INT8 or fp16 table as floats."""

from __future__ import annotations

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import kernel_jit
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES


@kernel_jit
def embedding(ids, values, scales, group_size, out):
    """out (T, H) = the rows ids of the table at addresses values and scales."""
    num_tokens, hidden_size = out.shape
    num_groups = hidden_size // group_size
    place = out.ctypes.data
    for t in range(num_tokens):
        row_values = values + ids[t] * hidden_size
        row_scales = scales + ids[t] * num_groups * 2
        for group in range(num_groups):
            scale = simd.broadcast(memory.float16_at(row_scales + group * 2))
            for column in range(group * group_size, (group + 1) * group_size, LANES):
                memory.store(place, memory.load_int8(row_values + column) * scale)
                place += VECTOR_BYTES


@kernel_jit
def embedding_float16(ids, values, out):
    """As `embedding`, of a table in fp16."""
    num_tokens, hidden_size = out.shape
    place = out.ctypes.data
    for t in range(num_tokens):
        row = values + ids[t] * hidden_size * 2
        for column in range(0, hidden_size, LANES):
            memory.store(place, memory.load_float16(row + column * 2))
            place += VECTOR_BYTES
