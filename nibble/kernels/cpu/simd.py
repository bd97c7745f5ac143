"""Arithmetic on vectors of 16 floats in Numba code.

Numba compiles scalar loops and leaves vectorising to LLVM, which is not certain enough for the inner loops here; these
functions are a few lines of LLVM IR each. `memory.py` loads and stores the vectors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import (
    F32X16,
    I16,
    I32,
    I32X16,
    LANES,
    VectorType,
    call_fma,
    call_intrinsic,
    shuffle,
    splat,
    splat_f32,
    splat_i32,
    sum_lanes,
    unpack_tuple,
    vector,
)

MASKED = -3.0e38  # an attention score below all others, and finite: differences stay numbers


@intrinsic
def broadcast(typingctx: Any, value: Any) -> Any:
    """A float32 in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call_fma(builder, *args)

    return vector(vector, vector, vector), codegen


@intrinsic
def rint(typingctx: Any, value: Any) -> Any:
    """To the nearest integer, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return call_intrinsic(builder, "llvm.rint.v16f32", F32X16, *args)

    return vector(vector), codegen


@intrinsic
def power_of_two(typingctx: Any, value: Any) -> Any:
    """2^value of integers in -126..127: the exponent bits, set directly."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        exponents = builder.add(builder.fptosi(args[0], I32X16), splat_i32(127))
        return builder.bitcast(builder.shl(exponents, splat_i32(23)), F32X16)

    return vector(vector), codegen


@intrinsic
def first_of(typingctx: Any, value: Any) -> Any:
    """Lane 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], I32(0))

    return types.float32(vector), codegen


@intrinsic
def lane(typingctx: Any, value: Any, index: Any) -> Any:
    """One lane, by number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], args[1])

    return types.float32(vector, types.int64), codegen


@intrinsic
def sum_of(typingctx: Any, value: Any) -> Any:
    """The sum of the lanes, in a fixed order."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(sum_lanes(builder, [args[0]]), I32(0))

    return types.float32(vector), codegen


def _binary(emit: Callable[[Any, Any, Any], Any]) -> Any:
    def typed(typingctx: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return emit(builder, *args)

        return vector(vector, vector), codegen

    return intrinsic(typed)


_add = _binary(lambda builder, a, b: builder.fadd(a, b))
_sub = _binary(lambda builder, a, b: builder.fsub(a, b))
_mul = _binary(lambda builder, a, b: builder.fmul(a, b))
_div = _binary(lambda builder, a, b: builder.fdiv(a, b))
# The one of a and b that is larger (smaller), b where one of them is a NaN: a single instruction on x86.
maximum = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
minimum = _binary(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))


def _reduction(relation: str) -> Any:
    def typed(typingctx: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, half = args[0], LANES // 2
            while half:
                other = shuffle(builder, value, value, [(lane + half) % LANES for lane in range(LANES)])
                value = builder.select(builder.fcmp_ordered(relation, value, other), value, other)
                half //= 2
            return builder.extract_element(value, I32(0))

        return types.float32(vector), codegen

    return intrinsic(typed)


max_of = _reduction(">")
min_of = _reduction("<")


@intrinsic
def zeros(typingctx: Any, count: Any) -> Any:
    """A tuple of `count` (a literal) zero vectors."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    result = types.UniTuple(vector, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, [ir.Constant(F32X16, [0.0] * LANES)] * count.literal_value)

    return result(count), codegen


@intrinsic
def sum_all(typingctx: Any, sums: Any) -> Any:
    """The sums of the vectors of a tuple (1, 2, 4, 8 or 16), in the first lanes of one vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return sum_lanes(builder, unpack_tuple(builder, args[0], len(sums)))

    return vector(sums), codegen


def _mask(relation: str) -> Any:
    def typed(typingctx: Any, scores: Any, count: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lanes = ir.Constant(ir.VectorType(ir.IntType(64), LANES), list(range(LANES)))
            first = builder.insert_element(ir.Constant(lanes.type, ir.Undefined), args[1], I32(0))
            limit = shuffle(builder, first, first, [0] * LANES)
            return builder.select(builder.icmp_signed(relation, lanes, limit), args[0], splat_f32(MASKED))

        return vector(vector, types.int64), codegen

    return intrinsic(typed)


mask_from = _mask("<")  # (scores, count): scores with lanes count.. replaced by MASKED
mask_before = _mask(">=")  # ... with lanes ..count - 1 replaced


@intrinsic
def has_nan(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", _lane_bits(builder, builder.fcmp_unordered("uno", args[0], args[0])), I16(0))

    return types.boolean(vector), codegen


@intrinsic
def find(typingctx: Any, values: Any, value: Any) -> Any:
    """The first lane that equals value, LANES if there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _lane_bits(builder, builder.fcmp_ordered("oeq", args[0], splat(builder, args[1])))
        return builder.zext(builder.cttz(mask, ir.Constant(ir.IntType(1), 0)), ir.IntType(64))  # cttz(0) = 16 bits

    return types.int64(vector, types.float32), codegen


def _bound(relation: str) -> Any:
    def typed(typingctx: Any, value: Any, bound: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, bound = args
            return builder.select(builder.fcmp_ordered(relation, value, bound), bound, value)

        return vector(vector, vector), codegen

    return intrinsic(typed)


at_least = _bound("<")  # the larger one; a NaN in value stays
at_most = _bound(">")


@intrinsic
def zero_where_less(typingctx: Any, a: Any, b: Any, values: Any) -> Any:
    """values, 0 in the lanes where a < b."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), splat_f32(0.0), args[2])

    return vector(vector, vector, vector), codegen


@intrinsic
def count_outside(typingctx: Any, value: Any, low: Any, high: Any) -> Any:
    """How many lanes are not in low .. high; a NaN is in no range."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, low, high = args
        outside = builder.or_(builder.fcmp_unordered("<", value, low), builder.fcmp_unordered(">", value, high))
        return builder.zext(builder.ctpop(_lane_bits(builder, outside)), ir.IntType(64))

    return types.int64(vector, vector, vector), codegen


def _lane_bits(builder: Any, lanes: Any) -> Any:
    return builder.bitcast(lanes, I16)


def _operator(function: Any, implementation: Any) -> None:
    def typed(a, b):  # numba wants the implementation's signature, annotations included
        return implementation if isinstance(a, VectorType) and isinstance(b, VectorType) else None

    overload(function)(typed)


_operator(operator.add, lambda a, b: _add(a, b))
_operator(operator.sub, lambda a, b: _sub(a, b))
_operator(operator.mul, lambda a, b: _mul(a, b))
_operator(operator.truediv, lambda a, b: _div(a, b))


# --- exp, after Cephes expf (S. Moshier): 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], error below 2 ulp

EXP_LOW, EXP_HIGH = np.float32(-87.0), np.float32(88.0)  # 2^n stays a normal number; outside, the bound's exp
LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = np.float32(-0.693359375), np.float32(2.12194440e-4)  # minus ln 2 in two parts
EXP_POLYNOMIAL = tuple(
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)


@inline_jit
def exp(x):
    """e^x of each lane; x is clamped to -87..88, a NaN stays one."""
    x = at_most(at_least(x, broadcast(EXP_LOW)), broadcast(EXP_HIGH))
    n = rint(x * broadcast(LOG2_E))
    x = fma(n, broadcast(LN2_LOW), fma(n, broadcast(LN2_HIGH), x))
    p = broadcast(EXP_POLYNOMIAL[0])
    for i in range(1, 6):
        p = fma(p, x, broadcast(EXP_POLYNOMIAL[i]))
    one = broadcast(np.float32(1))
    return fma(p, x * x, x + one) * power_of_two(n)


@inline_jit
def exp_or_zero(x):
    """`exp`, but 0 below its range (-inf included)."""
    return zero_where_less(x, broadcast(EXP_LOW), exp(x))
