"""x as fixed-point numbers of three int8 digits, for exact products with the integers of INT4 and INT8 weights.

A block is 32 columns of one row of x. Its values are rounded to integers X = x / unit, where unit is the smallest power
of two for which no |X| exceeds 127 * (2^16 + 2^8 + 1): an error of 2^-23 of the block's largest magnitude at most.
X = 65536 high + 256 middle + low, with digits in -128..127. A block with a NaN or an infinity has the unit NaN, which
makes its whole row of the result NaN.

The digits of a block are 32 high, 32 middle and 32 low bytes. Beside them are its factors, 32 bytes: (int32) for each
of the three the sum of its digits times what a weight's byte of 0 stands for (-8 for INT4, -128 for INT8), then (fp32)
unit and unit * sum of X. Both lie block by block, within a block token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import (
    I8,
    I32,
    I32X16,
    LANES,
    VECTOR_BYTES,
    call_intrinsic,
    shuffle,
    splat_i32,
    store_at,
    vector,
)

BLOCK = 32  # columns that share a unit; every INT4 group is a multiple of it
NUM_DIGITS = 3
INT4_CENTER, INT8_CENTER = 8, 128  # what a weight's byte holds more than the weight
DIGITS_BYTES = NUM_DIGITS * BLOCK
FACTORS_BYTES = 32
CENTERS, UNIT, X_SUM = 0, 12, 16  # places in the factors

LARGEST_EXPONENT = 22  # of the largest X, which has 23 bits
# Added to the bits of a float32, it raises the exponent of those that 23 bits would not hold as digits.
CARRY = 2 * (2**23 - 127 * (2**16 + 2**8 + 1))
MAX_EXPONENT = 96  # a block below 2^-74 has fewer bits, so that unit times an fp16 stays a normal number
DIGIT_BIAS = 0x808080


@intrinsic
def _store_digits(typingctx: Any, low: Any, high: Any, center: Any, digits: Any, factors: Any) -> Any:
    """Write the digits of 32 integers (as float32) and -center times the digits' sums."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bias = splat_i32(DIGIT_BIAS)
        # Each byte of X + bias is a digit + 128, and so is the digit with its top bit changed.
        halves = [builder.xor(builder.add(builder.fptosi(value, I32X16), bias), bias) for value in args[:2]]
        for digit in range(NUM_DIGITS):
            shift = splat_i32(8 * (NUM_DIGITS - 1 - digit))
            bytes_ = [builder.trunc(builder.lshr(half, shift), ir.VectorType(I8, LANES)) for half in halves]
            wide = [builder.sext(half, I32X16) for half in bytes_]
            total = call_intrinsic(builder, "llvm.vector.reduce.add.v16i32", I32, builder.add(*wide))
            total = builder.mul(total, builder.neg(builder.trunc(args[2], I32)))
            for half in range(2):
                store_at(builder, args[3], bytes_[half], digit * BLOCK + half * LANES)
            store_at(builder, args[4], total, CENTERS + 4 * digit)
        return context.get_dummy_value()

    return types.void(vector, vector, types.intp, types.intp, types.intp), codegen


@intrinsic
def _bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], I32), ir.IntType(64))

    return types.int64(types.float32), codegen


@intrinsic
def _nibble_order(typingctx: Any, values: Any) -> Any:
    """16 columns in the order in which the bytes of a fragment's words meet them (layout.py): c0, c0+8, c0+1, c0+9."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return shuffle(builder, args[0], args[0], [2 * c + i for c in range(4) for i in (0, 8, 1, 9)])

    return vector(vector), codegen


@inline_jit
def _split_block(x, is_int4, digits, factors):
    low, high = memory.load(x), memory.load(x + VECTOR_BYTES)
    zero = simd.broadcast(np.float32(0))
    largest = simd.max_of(simd.maximum(simd.maximum(low, zero - low), simd.maximum(high, zero - high)))
    is_bad = simd.has_nan(low * zero + high * zero)  # infinity times zero is NaN too
    if is_bad:
        low, high, largest = zero, zero, np.float32(0)
    exponent = min(LARGEST_EXPONENT + 127 - ((_bits(largest) + CARRY) >> 23), MAX_EXPONENT)
    factor = simd.power_of_two(simd.broadcast(np.float32(exponent)))
    low, high = simd.rint(low * factor), simd.rint(high * factor)
    unit = np.float32(np.nan) if is_bad else simd.first_of(simd.power_of_two(simd.broadcast(np.float32(-exponent))))
    memory.store_float32(factors + UNIT, unit)
    memory.store_float32(factors + X_SUM, simd.sum_of(low + high) * unit)
    if is_int4:
        low, high = _nibble_order(low), _nibble_order(high)
    _store_digits(low, high, INT4_CENTER if is_int4 else INT8_CENTER, digits, factors)


@inline_jit
def split(x, num_tokens, num_columns, is_int4, digits, factors):
    """digits and factors of x (num_tokens, num_columns); of is_int4, in the column order of INT4 tiles. Addresses."""
    for token in range(num_tokens):
        for block in range(num_columns // BLOCK):
            place = block * num_tokens + token
            _split_block(x, is_int4, digits + place * DIGITS_BYTES, factors + place * FACTORS_BYTES)
            x += BLOCK * 4
