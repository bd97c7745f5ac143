"""Reading and writing memory by address in Numba code: vectors of 16 and single numbers, no alignment, no bounds."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from nibble.kernels.cpu.vector_ir import F16, F32, F32X16, I8, I32, I32X16, LANES, load_at, shuffle, store_at, vector


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
