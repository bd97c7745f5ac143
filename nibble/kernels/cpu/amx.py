"""Intel AMX: 16 x 16 tiles of fp32 sums over bf16 products, as functions for Numba code. x86-64 Linux only.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, "Intel AMX"; a tile is 16 rows of 64 bytes.
C (16 x 16 fp32) += A (16 x 32 bf16, rows) times B (32 x 16 bf16, of which row p holds rows 2p and 2p + 1 in pairs).
Tile registers 0..3 are the sums of 2 x 2 tiles, 4 and 5 A, 6 and 7 B.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from nibble.kernels.cpu.vector_ir import F32X16, I8, I32X16, LANES, load_at, shuffle, splat_i32, store_at, vector

TILE = 16  # rows of a tile, and columns of fp32
TILE_DEPTH = 32  # bf16 values of a tile row
TILE_BYTES = 1024
SYS_ARCH_PRCTL = 158
ARCH_REQ_XCOMP_PERM = 0x1023
XFEATURE_XTILEDATA = 18


@functools.cache
def is_available() -> bool:
    """Whether the CPU has bf16 tiles and the kernel lets this process use them (it has to be asked)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not all(name in cpu_features() for name in ("amx-tile", "amx-bf16", "avx512bf16", "avx512vl")):
        return False
    return bool(ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)


def cpu_features() -> set[str]:
    """What Numba compiles for: the CPU's features, or those that NUMBA_CPU_FEATURES names instead."""
    if config.CPU_FEATURES is not None or config.CPU_NAME is not None:
        return {name[1:] for name in (config.CPU_FEATURES or "").split(",") if name.startswith("+")}
    return {name for name, has in binding.get_host_cpu_features().items() if has}


def tile_config() -> Any:
    """What `configure` takes: palette 1, 8 tiles of 16 rows of 64 bytes."""
    tiles = np.zeros(64, np.uint8)
    tiles[0] = 1
    tiles[16:32:2] = 64  # bytes per row, uint16 each
    tiles[48:56] = TILE  # rows
    return tiles


def _call(builder: Any, name: str, *args: Any) -> None:
    function_type = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, f"llvm.x86.{name}"), args)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


@intrinsic
def configure(typingctx: Any, config: Any) -> Any:
    """Load the 64 bytes of `tile_config` at an address: before any other function here, on each thread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "ldtilecfg", _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """Give the tile registers up: the system then saves none of them when it switches threads."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def zero_sums(typingctx: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            _call(builder, "tilezero", I8(tile))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def multiply_add(typingctx: Any, a: Any, a_stride: Any, b0: Any, b1: Any) -> Any:
    """The 2 x 2 sums += A (32 rows at a, a_stride bytes apart) times the B tiles at b0 and b1."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_stride, b0, b1 = args
        row_bytes = a_stride.type(64)
        second = builder.add(a, builder.mul(a_stride, a_stride.type(TILE)))
        _call(builder, "tileloadd64", I8(6), _pointer(builder, b0), row_bytes)
        _call(builder, "tileloadd64", I8(4), _pointer(builder, a), a_stride)
        _call(builder, "tileloadd64", I8(7), _pointer(builder, b1), row_bytes)
        _call(builder, "tdpbf16ps", I8(0), I8(4), I8(6))
        _call(builder, "tileloadd64", I8(5), _pointer(builder, second), a_stride)
        _call(builder, "tdpbf16ps", I8(1), I8(4), I8(7))
        _call(builder, "tdpbf16ps", I8(2), I8(5), I8(6))
        _call(builder, "tdpbf16ps", I8(3), I8(5), I8(7))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def store_sums(typingctx: Any, out: Any, stride: Any) -> Any:
    """Write the 2 x 2 sums, 32 x 32 fp32, to rows at out, stride bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, stride = args
        lower = builder.add(out, builder.mul(stride, stride.type(TILE)))
        for tile, place in enumerate((out, builder.add(out, out.type(64)), lower, builder.add(lower, out.type(64)))):
            _call(builder, "tilestored64", I8(tile), _pointer(builder, place), stride)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


class _BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite is untyped
    """The one LLVM float type that llvmlite does not know."""

    def __str__(self) -> str:
        return "bfloat"


BF16X16 = ir.VectorType(_BFloat16(), LANES)


@intrinsic
def store_bfloat16(typingctx: Any, address: Any, value: Any) -> Any:
    """Write 16 float32 as bf16, to nearest even; a NaN stays one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store_at(builder, args[0], builder.fptrunc(args[1], BF16X16))
        return context.get_dummy_value()

    return types.void(types.intp, vector), codegen


@intrinsic
def load_bfloat16(typingctx: Any, address: Any) -> Any:
    """16 bf16 at an address, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(load_at(builder, args[0], BF16X16), F32X16)

    return vector(types.intp), codegen


def bfloat16_pairs(builder: Any, low: Any, high: Any) -> Any:
    """<16 x i32>: low as bf16 in the lower halves, high in the upper ones. Finite values; ties away from zero."""
    half = splat_i32(0x8000)
    low_bits = builder.lshr(builder.add(builder.bitcast(low, I32X16), half), splat_i32(16))
    high_bits = builder.and_(builder.add(builder.bitcast(high, I32X16), half), splat_i32(-0x10000))
    return builder.or_(low_bits, high_bits)


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 lanes, transposed: in step s, lanes whose index differs in bit s change places.

    Of 8 vectors, lanes 0 to 7 and lanes 8 to 15 are transposed apart.
    """
    for distance in (1, 2, 4, 8)[: len(rows).bit_length() - 1]:
        low = [i if not i & distance else i - distance + LANES for i in range(LANES)]
        high = [i + distance if not i & distance else i + LANES for i in range(LANES)]
        swapped = list(rows)
        for i in range(len(rows)):
            if not i & distance:
                swapped[i] = shuffle(builder, rows[i], rows[i + distance], low)
                swapped[i + distance] = shuffle(builder, rows[i], rows[i + distance], high)
        rows = swapped
    return rows
