"""Rows of an INT8 table as floats."""

from __future__ import annotations

from nibble.kernels.cpu import simd
from nibble.kernels.cpu.jit import kernel_jit
from nibble.kernels.cpu.simd import LANES


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
            scale = simd.broadcast(simd.float16_at(row_scales + group * 2))
            for column in range(group * group_size, (group + 1) * group_size, LANES):
                simd.store(place, simd.load_int8(row_values + column) * scale)
                place += simd.VECTOR_BYTES
