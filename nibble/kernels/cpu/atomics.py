"""What threads need from below Numba: atomic words, a spin hint, function pointers, POSIX mutex and condition."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

I64 = ir.IntType(64)
MACHINE = platform.machine()
AARCH64_YIELD = 1  # operand of the hint instruction


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.intp), codegen


@intrinsic
def atomic_exchange(typingctx: Any, address: Any, value: Any) -> Any:
    """Store value (a full barrier); returns the old one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add value; returns the old one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def spin_hint(typingctx: Any) -> Any:
    """Tell the CPU that this is a spin loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if MACHINE in ("x86_64", "AMD64"):
            _call_void(builder, "llvm.x86.sse2.pause")
        elif MACHINE in ("aarch64", "arm64"):
            _call_void(builder, "llvm.aarch64.hint", ir.Constant(ir.IntType(32), AARCH64_YIELD))
        return context.get_dummy_value()

    return types.void(), codegen


def _call_void(builder: Any, name: str, *args: Any) -> None:
    function_type = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


@intrinsic
def call_pointer(typingctx: Any, function: Any, first: Any, second: Any) -> Any:
    """Call the void(int64, int64) function at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(args[0], function_type.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.int64, types.int64), codegen


_one = types.int32(types.intp)
_two = types.int32(types.intp, types.intp)
sched_yield = types.ExternalFunction("sched_yield", types.int32())
mutex_init = types.ExternalFunction("pthread_mutex_init", _two)
mutex_lock = types.ExternalFunction("pthread_mutex_lock", _one)
mutex_unlock = types.ExternalFunction("pthread_mutex_unlock", _one)
cond_init = types.ExternalFunction("pthread_cond_init", _two)
cond_wait = types.ExternalFunction("pthread_cond_wait", _two)
cond_broadcast = types.ExternalFunction("pthread_cond_broadcast", _one)
POSIX_OBJECT_BYTES = 128  # more than a pthread_mutex_t or pthread_cond_t takes on any platform (64)
