"""The end of a linear: bias and residual are added as a vector of outputs is written."""

from __future__ import annotations

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import LANES


@inline_jit
def store_rows(values, first_row, num_rows, bias, add, out):
    """out[first_row : first_row + 16] = values (+ bias) (+ out where add), guarded at num_rows. All addresses."""
    place = out + first_row * 4
    if first_row + LANES <= num_rows:
        if bias:
            values = values + memory.load(bias + first_row * 4)
        if add:
            values = values + memory.load(place)
        memory.store(place, values)
    else:
        for r in range(num_rows - first_row):
            value = simd.lane(values, r)
            if bias:
                value += memory.float32_at(bias + (first_row + r) * 4)
            if add:
                value += memory.float32_at(place + r * 4)
            memory.store_float32(place + r * 4, value)
