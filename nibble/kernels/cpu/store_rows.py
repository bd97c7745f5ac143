"""The end of a linear: bias and residual are added as a vector of outputs is written."""

from __future__ import annotations

import numpy as np

from nibble.kernels.cpu import simd
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.simd import LANES


@inline_jit
def store_rows(values, first_row, num_rows, bias, add, out):
    """out[first_row : first_row + 16] = values (+ bias) (+ out where add), guarded at num_rows. All addresses."""
    if bias:
        bias += first_row * 4
    out += first_row * 4
    if first_row + LANES <= num_rows:
        if bias:
            values = values + simd.load(bias)
        if add:
            values = values + simd.load(out)
        simd.store(out, values)
        return
    rows = np.empty(LANES, np.float32)
    simd.store(rows.ctypes.data, values)
    for r in range(num_rows - first_row):
        value = rows[r]
        if bias:
            value += simd.float32_at(bias + r * 4)
        if add:
            value += simd.float32_at(out + r * 4)
        simd.store_float32(out + r * 4, value)
