"""64 rows of INT8 weights as bf16 tiles, the B operand of `amx.py`: columns in pairs, rows in lanes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import amx
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import (
    F16,
    F32,
    F32X16,
    I8,
    I32X16,
    LANES,
    VECTOR_BYTES,
    load_at,
    shuffle,
    splat,
    store_at,
)
from nibble.kernels.layout import TILE_ROWS


@intrinsic
def unpack_tile(typingctx: Any, count: Any, values: Any, stride: Any, scales: Any, scale_stride: Any, out: Any) -> Any:
    """One B tile (to address out): 32 columns of `count` <= 16 rows at values, each with the scale at scales.

    The rows that are missing repeat the last one.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count, values, stride, scales, scale_stride, out = args
        zero = stride.type(0)
        rows = []
        for row in range(amx.TILE):
            scale = splat(builder, builder.fpext(load_at(builder, scales, F16), F32))
            integers = load_at(builder, values, ir.VectorType(I8, amx.TILE_DEPTH))
            pair = []
            for odd in range(2):
                column = shuffle(builder, integers, integers, list(range(odd, amx.TILE_DEPTH, 2)))
                pair.append(builder.fmul(builder.sitofp(builder.sext(column, I32X16), F32X16), scale))
            rows.append(amx.bfloat16_pairs(builder, *pair))
            has_next = builder.icmp_signed("<", count.type(row + 1), count)
            values = builder.add(values, builder.select(has_next, stride, zero))
            scales = builder.add(scales, builder.select(has_next, scale_stride, zero))
        for i, pairs in enumerate(amx.transpose(builder, rows)):
            store_at(builder, out, pairs, i * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@inline_jit
def unpack_rows(values, scales, num_rows, num_columns, group_size, out):
    """out: for each 32 columns the 4 B tiles of 64 rows, of which num_rows exist; the others are anything."""
    num_groups = num_columns // group_size
    for column in range(0, num_columns, amx.TILE_DEPTH):
        for row in range(0, TILE_ROWS, LANES):
            if row < num_rows:
                row_values = values + row * num_columns + column
                row_scales = scales + (row * num_groups + column // group_size) * 2
                unpack_tile(min(LANES, num_rows - row), row_values, num_columns, row_scales, num_groups * 2, out)
            out += amx.TILE_BYTES
