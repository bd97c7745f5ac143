"""Half a fragment of INT4 weights times a few rows of x: the inner step of `int4_linear.py`, in LLVM IR.

Source: layout.py for the tile order. One vector holds 16 words of a fragment (half of it): 4 rows x 4 column pairs.
Nibble i of its words multiplies 4 values of x, repeated for the 4 rows. Two instructions make it a float: shifted to
bits 19..22 under the exponent of 1.0 it reads 1 + q / 16, exactly. One multiply-add with scale and minimum / 16 - scale
gives w / 16, which meets 16 x. (w is exact in fp32 but where |minimum| < scale / 512: off by scale / 2^20 at most.)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu.vector_ir import (
    F16,
    F32,
    F32X16,
    I32X16,
    LANES,
    VECTOR_BYTES,
    call_fma,
    load_at,
    shuffle,
    splat_f32,
    splat_i32,
    store_at,
    unpack_tuple,
    vector,
)
from nibble.kernels.layout import FRAGMENT

MAX_TOKENS = 8  # 2 accumulators each: 16 of the 32 vector registers of AVX-512
NIBBLE_BITS = 4
NIBBLE_PLACE = 19  # the top 4 bits of a float32's mantissa
Q_PER_ONE = 16  # 1.0 in units of a nibble there
SCALE_BYTES = 4  # (scale, minimum) fp16
FOUR = 16  # bytes of 4 float32
HALF_SUMS_BYTES = 2 * MAX_TOKENS * VECTOR_BYTES  # running sums of half a fragment: rows r0, then rows r1, per token


@intrinsic
def permute_columns(typingctx: Any, values: Any) -> Any:
    """16 columns of x in the order in which nibbles meet them: nibble pair j = odd * 2 + column half, lane column c."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        order = [8 * (j & 1) + 2 * c + (j >> 1) for j in range(4) for c in range(4)]
        return shuffle(builder, args[0], args[0], order)

    return vector(vector), codegen


def _load_fours(builder: Any, address: Any, offset: int = 0) -> Any:
    """4 floats, repeated for the 4 rows of a vector."""
    four = load_at(builder, address, ir.VectorType(F32, 4), offset, align=4)
    return shuffle(builder, four, four, [lane % 4 for lane in range(LANES)])


@intrinsic
def load_sums(typingctx: Any, tokens: Any, totals: Any) -> Any:
    """The running sums of half a fragment: rows r0 of each token, then rows r1."""
    if not isinstance(tokens, types.IntegerLiteral):
        return None
    count = tokens.literal_value
    result = types.UniTuple(vector, 2 * count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = [load_at(builder, args[1], F32X16, _sum_place(i, count), align=4) for i in range(2 * count)]
        return context.make_tuple(builder, result, sums)

    return result(tokens, types.intp), codegen


@intrinsic
def store_sums(typingctx: Any, totals: Any, sums: Any) -> Any:
    """What `load_sums` reads."""
    count = len(sums) // 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i, value in enumerate(unpack_tuple(builder, args[1], len(sums))):
            store_at(builder, args[0], value, _sum_place(i, count), align=4)
        return context.get_dummy_value()

    return types.void(types.intp, sums), codegen


def _sum_place(i: int, tokens: int) -> int:
    row, token = divmod(i, tokens)
    return (row * MAX_TOKENS + token) * VECTOR_BYTES


@intrinsic
def row_scales(typingctx: Any, address: Any) -> Any:
    """scale and minimum / 16 - scale of rows r0, then of rows r1, of half a fragment; each row's in 4 lanes."""
    result = types.UniTuple(vector, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for offset in (0, FRAGMENT // 2 * SCALE_BYTES):
            pairs = builder.fpext(load_at(builder, args[0], ir.VectorType(F16, 8), offset), ir.VectorType(F32, 8))
            scale = shuffle(builder, pairs, pairs, [2 * (lane // 4) for lane in range(LANES)])
            minimum = shuffle(builder, pairs, pairs, [2 * (lane // 4) + 1 for lane in range(LANES)])
            sixteenth = splat_f32(1 / Q_PER_ONE)
            values += [scale, call_fma(builder, minimum, sixteenth, builder.fneg(scale))]
        return context.make_tuple(builder, result, values)

    return result(types.intp), codegen


def one_plus_nibble(builder: Any, words: Any, nibble: int) -> Any:
    """1 + q / 16 of nibble i of 16 words."""
    distance = NIBBLE_PLACE - NIBBLE_BITS * nibble
    words = builder.shl(words, splat_i32(distance)) if distance > 0 else builder.lshr(words, splat_i32(-distance))
    mask, one = 0xF << NIBBLE_PLACE, 0x3F800000
    value = builder.or_(builder.and_(words, splat_i32(mask)), splat_i32(one))
    return builder.bitcast(value, F32X16)


@intrinsic
def accumulate(typingctx: Any, sums: Any, scales: Any, words: Any, x: Any, x_stride: Any) -> Any:
    """sums + half a fragment (at words) times 16 permuted columns of each token (at x, x_stride bytes apart)."""
    tokens = len(sums) // 2

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = unpack_tuple(builder, args[0], len(sums))
        scale0, offset0, scale1, offset1 = unpack_tuple(builder, args[1], 4)
        word_vector = load_at(builder, args[2], I32X16, align=4)
        for pair in range(4):
            q0, q1 = (one_plus_nibble(builder, word_vector, 2 * pair + row) for row in range(2))
            weights = (call_fma(builder, q0, scale0, offset0), call_fma(builder, q1, scale1, offset1))
            x_token = args[3]
            for token in range(tokens):
                values = _load_fours(builder, x_token, FOUR * pair)
                for row in range(2):
                    place = row * tokens + token
                    accumulators[place] = call_fma(builder, weights[row], values, accumulators[place])
                x_token = builder.add(x_token, args[4])
        return context.make_tuple(builder, sums, accumulators)

    return sums(sums, scales, types.intp, types.intp, types.intp), codegen


@intrinsic
def row_sums(typingctx: Any, totals: Any) -> Any:
    """The 16 rows of a fragment for the token whose totals start at an address: each row's 4 lanes added up."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row1, high = MAX_TOKENS * VECTOR_BYTES, HALF_SUMS_BYTES
        # rows 0..3, 4..7, 8..11, 12..15
        a, b, c, d = (load_at(builder, args[0], F32X16, offset) for offset in (0, high, row1, high + row1))
        four = _add_pairs(builder, _add_pairs(builder, a, b), _add_pairs(builder, c, d))
        return shuffle(builder, four, four, [4 * (row % 4) + row // 4 for row in range(LANES)])

    return vector(types.intp), codegen


def _add_pairs(builder: Any, a: Any, b: Any) -> Any:
    """In each run of 4 lanes: a0 + a1, a2 + a3, b0 + b1, b2 + b3."""
    runs = range(0, LANES, 4)
    even = shuffle(builder, a, b, [run + lane for run in runs for lane in (0, 2, LANES, LANES + 2)])
    odd = shuffle(builder, a, b, [run + lane for run in runs for lane in (1, 3, LANES + 1, LANES + 3)])
    return builder.fadd(even, odd)
