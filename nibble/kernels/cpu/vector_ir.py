"""The LLVM vector of 16 floats as a Numba type, and the IR that intrinsics on it are built of.

Only generic IR is used: a vector is one zmm register on AVX-512, two ymm on AVX2, four on NEON. Memory is addressed by
integers (`array.ctypes.data` plus bytes), with no alignment and no bounds: the callers check shapes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

LANES = 16
VECTOR_BYTES = 4 * LANES

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
