"""32 columns of 16 rows of weights as unsigned bytes, and their products with the digits of x (`digits.py`).

8 vectors: rows in lanes, the bytes of a lane are 4 columns of its row. INT4 weights are q, INT8 weights q + 128.
vpdpbusd (AVX512-VNNI) adds the 4 products of a lane's bytes with 4 digits to the lane's int32.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import amx
from nibble.kernels.cpu.digits import (
    BLOCK,
    CENTERS,
    DIGITS_BYTES,
    FACTORS_BYTES,
    INT4_CENTER,
    NUM_DIGITS,
    UNIT,
    X_SUM,
)
from nibble.kernels.cpu.int4_panel import FRAGMENT_BYTES, transpose_fours
from nibble.kernels.cpu.vector_ir import (
    F16,
    F32,
    F32X16,
    I32,
    I32X16,
    LANES,
    VECTOR_BYTES,
    call_fma,
    call_intrinsic,
    load_at,
    shuffle,
    splat,
    splat_f32,
    splat_i32,
    store_at,
    unpack_tuple,
    vector,
)

ROWS = LANES
VECTORS = 8
VPDPBUSD = "llvm.x86.avx512.vpdpbusd.512"
tile = types.UniTuple(vector, VECTORS)  # integers under the type of floats


def is_available() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and {"avx512vnni", "avx512bw"} <= amx.cpu_features()


@intrinsic
def load_int4(typingctx: Any, words: Any) -> Any:
    """The tile of two fragments at words, columns in the order of `digits.split`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nibbles, columns = splat_i32(0x0F0F0F0F), []
        for fragment in range(2):
            start = fragment * FRAGMENT_BYTES
            halves = [load_at(builder, args[0], I32X16, start + half * VECTOR_BYTES) for half in range(2)]
            high_nibbles = [builder.lshr(half, splat_i32(4)) for half in halves]
            rows = [builder.and_(half, nibbles) for half in (*halves, *high_nibbles)]
            columns += transpose_fours(builder, rows)
        return _make_tile(context, builder, columns)

    return tile(types.intp), codegen


@intrinsic
def load_int8(typingctx: Any, count: Any, values: Any, stride: Any) -> Any:
    """The tile of 32 columns of `count` <= 16 rows at values, stride bytes apart; missing rows repeat the last one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = _load_rows(builder, ir.VectorType(I32, VECTORS), *args)
        # Lane 8 h + c of vector r is column group c of row r + 8 h.
        vectors = [shuffle(builder, rows[r], rows[r + VECTORS], list(range(LANES))) for r in range(VECTORS)]
        top = splat_i32(0x80808080 - (1 << 32))
        return _make_tile(context, builder, [builder.xor(v, top) for v in amx.transpose(builder, vectors)])

    return tile(types.intp, types.intp, types.intp), codegen


def _make_tile(context: Any, builder: Any, columns: list[Any]) -> Any:
    return context.make_tuple(builder, tile, [builder.bitcast(column, F32X16) for column in columns])


@intrinsic
def add_products(typingctx: Any, count: Any, weights: Any, scales: Any, digits: Any, factors: Any, totals: Any) -> Any:
    """totals of `count` (a literal) tokens += 16 rows and 32 columns of w times x; scales: a tuple (scale, minimum).

    The sums of (byte - center) * X are exact, and rounded when they meet the scale. Without minima the tuple has one
    vector. At an address: the digits and factors of x, the totals (a vector for each token).
    """
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, weights, scale_values, digits, factors, totals = args
        columns = [builder.bitcast(column, I32X16) for column in unpack_tuple(builder, weights, VECTORS)]
        sums = _digit_sums(builder, columns, digits, factors, count.literal_value)
        scale, *minima = unpack_tuple(builder, scale_values, len(scales))
        for token in range(count.literal_value):
            place = token * FACTORS_BYTES
            total = load_at(builder, totals, F32X16, token * VECTOR_BYTES)
            for minimum in minima:
                x_sum = splat(builder, load_at(builder, factors, F32, place + X_SUM))
                total = call_fma(builder, minimum, x_sum, total)
            unit = splat(builder, load_at(builder, factors, F32, place + UNIT))
            total = call_fma(builder, _combine(builder, *sums[token]), builder.fmul(scale, unit), total)
            store_at(builder, totals, total, token * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(count, tile, scales, types.intp, types.intp, types.intp), codegen


def _digit_sums(builder: Any, columns: list[Any], digits: Any, factors: Any, tokens: int) -> list[list[Any]]:
    """Of each token, for each digit, the sums of digit * (byte - center): below 2^20.

    Each instruction adds to another sum than the ones before it, so that none waits: one token alone has two sums a
    digit, of even and odd vectors.
    """
    keys = [(token, digit) for token in range(tokens) for digit in range(NUM_DIGITS)]
    starts = [load_at(builder, factors, I32, token * FACTORS_BYTES + CENTERS + 4 * digit) for token, digit in keys]
    parts = [[_splat_i32(builder, start) for start in starts]]
    if tokens == 1:
        parts.append([splat_i32(0)] * len(keys))
    for i, column in enumerate(columns):
        part = parts[i % len(parts)]
        for k, (token, digit) in enumerate(keys):
            x = _splat_i32(builder, load_at(builder, digits, I32, token * DIGITS_BYTES + digit * BLOCK + 4 * i))
            part[k] = call_intrinsic(builder, VPDPBUSD, I32X16, part[k], column, x)
    sums = [functools.reduce(builder.add, values) for values in zip(*parts, strict=True)]
    return [sums[token * NUM_DIGITS : (token + 1) * NUM_DIGITS] for token in range(tokens)]


def _combine(builder: Any, high: Any, middle: Any, low: Any) -> Any:
    """65536 high + 256 middle + low, rounded twice."""
    upper = builder.sitofp(builder.add(builder.shl(high, splat_i32(8)), middle), F32X16)
    return call_fma(builder, upper, splat_f32(256.0), builder.sitofp(low, F32X16))


def _splat_i32(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(I32X16, ir.Undefined), scalar, I32(0))
    return shuffle(builder, first, first, [0] * LANES)


@intrinsic
def int4_scales(typingctx: Any, address: Any) -> Any:
    """scale and minimum + 8 scale of the 16 rows whose (scale, minimum) are at an address."""
    result = types.UniTuple(vector, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sixteen = ir.VectorType(F16, LANES)
        first, second = [
            builder.fpext(load_at(builder, args[0], sixteen, half * 2 * LANES), F32X16) for half in range(2)
        ]
        scale, minimum = (shuffle(builder, first, second, list(range(odd, 2 * LANES, 2))) for odd in range(2))
        center = splat_f32(float(INT4_CENTER))
        return context.make_tuple(builder, result, [scale, call_fma(builder, scale, center, minimum)])

    return result(types.intp), codegen


@intrinsic
def transpose_scales(typingctx: Any, count: Any, scales: Any, stride: Any, out: Any) -> Any:
    """out fp32: for each of 16 groups, the fp16 scales of the rows; as `load_int8`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows = [builder.fpext(row, F32X16) for row in _load_rows(builder, ir.VectorType(F16, LANES), *args[:3])]
        for i, group in enumerate(amx.transpose(builder, rows)):
            store_at(builder, args[3], group, i * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def collect_scales(typingctx: Any, count: Any, scales: Any, stride: Any, out: Any) -> Any:
    """As `transpose_scales`, for one group."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i, scale in enumerate(_load_rows(builder, F16, *args[:3])):
            store_at(builder, args[3], builder.fpext(scale, F32), i * 4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


def _load_rows(builder: Any, llvm_type: Any, count: Any, address: Any, stride: Any) -> list[Any]:
    """The first value of 16 rows, of which `count` exist; those missing repeat the last one."""
    rows, zero = [], stride.type(0)
    for row in range(ROWS):
        rows.append(load_at(builder, address, llvm_type))
        has_next = builder.icmp_signed("<", count.type(row + 1), count)
        address = builder.add(address, builder.select(has_next, stride, zero))
    return rows
