"""How others pack linears of 4 or 8 bits into safetensors: AWQ "gemm", GPTQ, compressed-tensors "pack-quantized".

Each stores P = 32 / bits numbers per int32, number i of P in the bits from bits * i on, and w = scale * (q - zero). N
rows, K columns, G columns with one scale. Instead of X.weight there are:

    AWQ     X.qweight int32 (K, N / 8), X.qzeros int32 (K / G, N / 8), X.scales (K / G, N); of each eight along N,
            number i is the one at place 0, 2, 4, 6, 1, 3, 5, 7; 4 bits alone
    GPTQ    X.qweight int32 (K / P, N), X.qzeros int32 (K / G, N / P), X.scales (K / G, N), X.g_idx int32 (K,): the
            group of each column, which is not k / G where columns were quantised in another order. Zeros are one too
            small, modulo 2^bits, but in checkpoints of format gptq_v2
    c.-t.   X.weight_packed int32 (N, K / P), X.weight_scale (N, K / G), X.weight_shape int64 (2,), where asymmetric
            X.weight_zero_point int32 (N / P, K / G), where reordered X.weight_g_idx as GPTQ's; q and zero are
            2^(bits - 1) larger than the numbers that they stand for

Of 8 bits those are supported whose zeros are all 128: then q - 128 is an INT8 weight.

Source: AutoAWQ, awq/modules/linear/gemm.py; AutoGPTQ, nn_modules/qlinear; compressed-tensors, compressors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.row_formats import GROUP_SIZE
from nibble.engine.checkpoint.source import Int4Rows, Int8Rows, RowFormat, Rows
from nibble.kernels.layout import GROUP_SIZES

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
FLOATS = ("F16", "BF16", "F32")

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class PackedLinear(NamedTuple):
    """A linear as it is stored, q and zero 0..15 or 0..255."""

    q: Bytes  # (N, K)
    scale: npt.NDArray[np.float32]  # (N, K / G)
    zero: Bytes  # (N, K / G)


class Tensor(NamedTuple):
    """A tensor that has to be there. dtypes: safetensors' names."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class Packing(Protocol):
    """One of the three ways. bits: 4 or 8. group_size: as the checkpoint says, -1 for all columns."""

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def is_reordered(self) -> bool:
        """Whether columns of a group are expected not to be neighbours. What is stored decides."""

    @property
    def marker(self) -> str:
        """The suffix of what is there instead of X.weight."""

    @property
    def groups(self) -> str:
        """The suffix of the columns' groups, which may be absent."""

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        """What has to be there but for the columns' groups, by suffix."""

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        """get: the array of a suffix, floats as float32."""


@dataclass(frozen=True)
class AWQ:
    group_size: int
    bits: int = 4
    is_reordered: bool = False
    marker: str = "qweight"
    groups: str = "g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups, num_words = num_groups(num_columns, self.group_size), num_rows // per_word(self.bits)
        return {
            "qweight": Tensor(("I32",), (num_columns, num_words)),
            "qzeros": Tensor(("I32",), (groups, num_words)),
            "scales": Tensor(FLOATS, (groups, num_rows)),
        }

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        q, zero = (_in_places(unpack_words(get(name), self.bits), AWQ_PLACES) for name in ("qweight", "qzeros"))
        scale = np.ascontiguousarray(get("scales").T)
        return PackedLinear(np.ascontiguousarray(q.T), scale, np.ascontiguousarray(zero.T))


@dataclass(frozen=True)
class GPTQ:
    group_size: int
    zero_offset: int  # what has to be added to stored zeros
    bits: int = 4
    is_reordered: bool = False
    marker: str = "qweight"
    groups: str = "g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups, numbers = num_groups(num_columns, self.group_size), per_word(self.bits)
        return {
            "qweight": Tensor(("I32",), (num_columns // numbers, num_rows)),
            "qzeros": Tensor(("I32",), (groups, num_rows // numbers)),
            "scales": Tensor(FLOATS, (groups, num_rows)),
        }

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        q = unpack_words(np.ascontiguousarray(get("qweight").T), self.bits)
        zero = unpack_words(get("qzeros"), self.bits) + np.uint8(self.zero_offset) & np.uint8((1 << self.bits) - 1)
        scale = np.ascontiguousarray(get("scales").T)
        return PackedLinear(q, scale, np.ascontiguousarray(zero.T))


@dataclass(frozen=True)
class CompressedTensors:
    group_size: int
    is_symmetric: bool
    bits: int = 4
    is_reordered: bool = False
    marker: str = "weight_packed"
    groups: str = "weight_g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups, numbers = num_groups(num_columns, self.group_size), per_word(self.bits)
        found = {
            "weight_packed": Tensor(("I32",), (num_rows, num_columns // numbers)),
            "weight_scale": Tensor(FLOATS, (num_rows, groups)),
            "weight_shape": Tensor(("I64", "I32"), (2,)),
        }
        if not self.is_symmetric:
            found["weight_zero_point"] = Tensor(("I32",), (num_rows // numbers, groups))
        return found

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        scale = get("weight_scale")
        zero = np.full(scale.shape, 1 << (self.bits - 1), np.uint8)
        if not self.is_symmetric:
            words = np.ascontiguousarray(get("weight_zero_point").T)
            zero = np.ascontiguousarray(unpack_words(words, self.bits).T)
        return PackedLinear(unpack_words(get("weight_packed"), self.bits), scale, zero)


def per_word(bits: int) -> int:
    """Numbers in an int32."""
    return 32 // bits


def row_format(packing: Packing, num_rows: int, num_columns: int) -> RowFormat | None:
    """Of `to_rows`; None: such a linear is not supported."""
    size = num_columns if packing.group_size == -1 else packing.group_size
    if num_rows % per_word(packing.bits) or num_columns % size:
        return None
    sizes = (GROUP_SIZE,) if packing.bits == 8 else sorted(GROUP_SIZES, reverse=True)
    group_size = next((each for each in sizes if size % each == 0), None)
    return None if group_size is None else RowFormat("int8" if packing.bits == 8 else "int4", group_size)


def num_groups(num_columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-num_columns // group_size)


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> Bytes:
    """(rows, columns) int32 -> new (rows, P columns), number i of a word at place i."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(len(words), -1)


def column_order(group_of: npt.NDArray[np.int32], stored_groups: int) -> npt.NDArray[np.int32] | None:
    """The columns, those of one group together; None where they are already.

    Raises ValueError for groups that do not exist or are not all equally large.
    """
    size = len(group_of) // stored_groups
    if np.array_equal(group_of, np.arange(len(group_of)) // size):
        return None
    if group_of.min() < 0 or group_of.max() >= stored_groups:
        raise ValueError(f"has a group outside of 0..{stored_groups - 1}")
    if (np.bincount(group_of, minlength=stored_groups) != size).any():
        raise ValueError("has groups of different sizes")
    return np.argsort(group_of, kind="stable").astype(np.int32)


def to_rows(packed: PackedLinear, order: npt.NDArray[np.int32] | None, form: RowFormat) -> Rows:
    """In the format that `row_format` gave, the columns in this order (column j is order[j] of the linear).

    Raises ValueError for zeros that INT8 has not.
    """
    repeats = packed.q.shape[1] // packed.scale.shape[1] // form.group_size
    q = packed.q if order is None else np.ascontiguousarray(packed.q[:, order])
    with np.errstate(over="ignore"):
        scale = packed.scale.astype(np.float16)
        if form.kind == "int8":
            if (packed.zero != 128).any():
                raise ValueError("has 8 bits and zeros that are not 128, which is not supported")
            return Int8Rows((q ^ np.uint8(128)).view(np.int8), np.repeat(scale, repeats, axis=1))  # q - 128
        minimum = (scale.astype(np.float32) * -packed.zero.astype(np.float32)).astype(np.float16)
    return Int4Rows(q, np.repeat(scale, repeats, axis=1), np.repeat(minimum, repeats, axis=1))


def _in_places(numbers: Bytes, places: tuple[int, ...]) -> Bytes:
    """Of each eight, number i goes to places[i]."""
    eights = numbers.reshape(len(numbers), -1, len(places))
    return eights[:, :, np.argsort(places)].reshape(numbers.shape)
