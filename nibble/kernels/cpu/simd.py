"""Vectors of 16 floats as values in Numba code.

Numba compiles scalar loops and leaves vectorising to LLVM, which is not certain enough for the inner loops here. This
module adds a type that is an LLVM `<16 x float>` and functions on it, each a few lines of LLVM IR. Only generic
IR is used: one zmm register on AVX-512, two ymm on AVX2, four on NEON. Memory is addressed by integers
(`array.ctypes.data` plus bytes), with no alignment and no bounds: the callers check shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

from nibble.kernels.cpu.jit import inline_jit

LANES = 16
VECTOR_BYTES = 4 * LANES
MASKED = -3.0e38  # an attention score below all others, and finite: differences stay numbers

F32 = ir.FloatType()
F16 = ir.HalfType()
I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
F32X16 = ir.VectorType(F32, LANES)
I32X16 = ir.VectorType(I32, LANES)


class VectorType(types.Type):  # type: ignore[misc]  # numba is untyped
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, F32X16)


# --- LLVM IR building blocks, shared by the intrinsics of other modules


def load_at(builder: Any, address: Any, llvm_type: Any, offset: int = 0, align: int = 1) -> Any:
    """The value of llvm_type at integer address + offset."""
    place = builder.add(address, address.type(offset)) if offset else address
    return builder.load(builder.inttoptr(place, llvm_type.as_pointer()), align=align)


def store_at(builder: Any, address: Any, value: Any, offset: int = 0, align: int = 1) -> None:
    place = builder.add(address, address.type(offset)) if offset else address
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=align)


def splat_i32(value: int) -> Any:
    return ir.Constant(I32X16, [value] * LANES)


def splat_f32(value: float) -> Any:
    return ir.Constant(F32X16, [value] * LANES)


def splat(builder: Any, scalar: Any) -> Any:
    """A scalar in every lane."""
    first = builder.insert_element(ir.Constant(F32X16, ir.Undefined), scalar, I32(0))
    return shuffle(builder, first, first, [0] * LANES)


def shuffle(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Lanes of a (0..n-1) and b (n..2n-1) by constant index."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def call_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_intrinsic(builder, "llvm.fma.v16f32", F32X16, a, b, c)


def call_intrinsic(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic by its full (mangled) name."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sum of each of 1, 2, 4, 8 or 16 vectors, in that many first lanes of one vector.

    Each vector's lanes are added as a tree: lane l and l + 8, then l + 4, l + 2, l + 1; the order does not depend on
    how many vectors there are. While there is more than one, two of them share each addition.
    """
    blocks, block = 1, LANES  # every vector holds `blocks` blocks of lanes that belong together
    while block > 1:
        half = block // 2
        sources = 2 if len(vectors) > 1 else 1
        low = [source * LANES + b * block + i for source in range(sources) for b in range(blocks) for i in range(half)]
        low += [0] * (LANES - len(low))  # lanes nobody reads
        high = [lane + half for lane in low]
        pairs = zip(vectors[::sources], vectors[sources - 1 :: sources], strict=True)
        vectors = [builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high)) for a, b in pairs]
        blocks, block = blocks * sources, half
    return vectors[0]


def unpack_tuple(builder: Any, value: Any, count: int) -> list[Any]:
    return [builder.extract_value(value, i) for i in range(count)]


# --- functions for Numba code


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """16 float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_at(builder, args[0], F32X16)

    return vector(types.intp), codegen


@intrinsic
def load_int8(typingctx: Any, address: Any) -> Any:
    """16 int8 at an address, as floats."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.sext(load_at(builder, args[0], ir.VectorType(I8, LANES)), I32X16), F32X16)

    return vector(types.intp), codegen


@intrinsic
def load_float16(typingctx: Any, address: Any) -> Any:
    """16 float16 at an address, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(load_at(builder, args[0], ir.VectorType(F16, LANES)), F32X16)

    return vector(types.intp), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_at(builder, *args)
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def store_four(typingctx: Any, address: Any, value: Any) -> Any:
    """Write the first 4 of 16 float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_at(builder, args[0], shuffle(builder, args[1], args[1], [0, 1, 2, 3]))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def store_float16(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 float32 as float16, to nearest even. The caller clips to float16's range."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_at(builder, args[0], builder.fptrunc(args[1], ir.VectorType(F16, LANES)))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def store_int8(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 float32 that hold integers in -128..127 as int8."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integers = builder.fptosi(args[1], I32X16)
        store_at(builder, args[0], builder.trunc(integers, ir.VectorType(I8, LANES)))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def float16_at(typingctx: Any, address: Any) -> Any:
    """The float16 scalar at an address, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(load_at(builder, args[0], F16), F32)

    return types.float32(types.intp), codegen


@intrinsic
def float32_at(typingctx: Any, address: Any) -> Any:
    """The float32 scalar at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_at(builder, args[0], F32)

    return types.float32(types.intp), codegen


@intrinsic
def int32_at(typingctx: Any, address: Any) -> Any:
    """The int32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(load_at(builder, args[0], I32), ir.IntType(64))

    return types.int64(types.intp), codegen


@intrinsic
def int64_at(typingctx: Any, address: Any) -> Any:
    """The int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_at(builder, args[0], ir.IntType(64))

    return types.int64(types.intp), codegen


@intrinsic
def store_float32(typingctx: Any, address: Any, value: Any) -> Any:
    """Write one float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_at(builder, *args)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which may lie anywhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], I8.as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # a read, into all levels, of data
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def keep_alive(typingctx: Any, array: Any) -> Any:
    """Numba frees an array after its last use, and its address in an integer is none: use it once more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), codegen


@intrinsic
def address_as_void_pointer(typingctx: Any, address: Any) -> Any:
    """For `numba.carray`: an array at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), codegen


@intrinsic
def store_float16_scalar(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a float32 as float16, to nearest even; returns the rounded value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rounded = builder.fptrunc(args[1], F16)
        store_at(builder, args[0], rounded)
        return builder.fpext(rounded, F32)

    return types.float32(types.intp, types.float32), codegen


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


@intrinsic
def mask_from(typingctx: Any, scores: Any, count: Any) -> Any:
    """scores with lanes count.. replaced by MASKED."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = ir.Constant(ir.VectorType(ir.IntType(64), LANES), list(range(LANES)))
        first = builder.insert_element(ir.Constant(lanes.type, ir.Undefined), args[1], I32(0))
        limit = shuffle(builder, first, first, [0] * LANES)
        return builder.select(builder.icmp_signed("<", lanes, limit), args[0], splat_f32(MASKED))

    return vector(vector, types.int64), codegen


@intrinsic
def has_nan(typingctx: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.icmp_unsigned("!=", _mask(builder, builder.fcmp_unordered("uno", args[0], args[0])), I16(0))

    return types.boolean(vector), codegen


@intrinsic
def find(typingctx: Any, values: Any, value: Any) -> Any:
    """The first lane that equals value, LANES if there is none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = _mask(builder, builder.fcmp_ordered("oeq", args[0], splat(builder, args[1])))
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


def _mask(builder: Any, lanes: Any) -> Any:
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
