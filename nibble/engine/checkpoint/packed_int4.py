"""How others pack 4-bit linears into safetensors: AWQ "gemm", GPTQ, compressed-tensors "pack-quantized".

Each stores eight 4-bit numbers per int32, number i of eight in bits 4i..4i+3, and w = scale * (q - zero). N rows,
K columns, G columns with one scale. Instead of X.weight there are:

    AWQ     X.qweight int32 (K, N / 8), X.qzeros int32 (K / G, N / 8), X.scales (K / G, N); of each eight along N,
            number i is the one at place 0, 2, 4, 6, 1, 3, 5, 7
    GPTQ    X.qweight int32 (K / 8, N), X.qzeros int32 (K / G, N / 8), X.scales (K / G, N), X.g_idx int32 (K,): the
            group of each column, which is not k / G where columns were quantised in another order. Zeros are one too
            small, modulo 16, but in checkpoints of format gptq_v2
    c.-t.   X.weight_packed int32 (N, K / 8), X.weight_scale (N, K / G), X.weight_shape int64 (2,), where asymmetric
            X.weight_zero_point int32 (N / 8, K / G), where reordered X.weight_g_idx as GPTQ's; q and zero are 8 larger
            than the numbers that they stand for

Source: AutoAWQ, awq/modules/linear/gemm.py; AutoGPTQ, nn_modules/qlinear; compressed-tensors, compressors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.source import Int4Rows
from nibble.kernels.layout import GROUP_SIZES

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
FLOATS = ("F16", "BF16", "F32")

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


class PackedLinear(NamedTuple):
    """A linear as it is stored, q and zero 0..15."""

    q: Bytes  # (N, K)
    scale: npt.NDArray[np.float32]  # (N, K / G)
    zero: Bytes  # (N, K / G)


class Tensor(NamedTuple):
    """A tensor that has to be there. dtypes: safetensors' names."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


class Packing(Protocol):
    """One of the three ways. group_size: as the checkpoint says, -1 for all columns."""

    @property
    def group_size(self) -> int: ...

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
    marker: str = "qweight"
    groups: str = "g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups = num_groups(num_columns, self.group_size)
        return {
            "qweight": Tensor(("I32",), (num_columns, num_rows // PER_WORD)),
            "qzeros": Tensor(("I32",), (groups, num_rows // PER_WORD)),
            "scales": Tensor(FLOATS, (groups, num_rows)),
        }

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        q, zero = (_in_places(unpack_words(get(name)), AWQ_PLACES) for name in ("qweight", "qzeros"))
        scale = np.ascontiguousarray(get("scales").T)
        return PackedLinear(np.ascontiguousarray(q.T), scale, np.ascontiguousarray(zero.T))


@dataclass(frozen=True)
class GPTQ:
    group_size: int
    zero_offset: int  # what has to be added to stored zeros
    marker: str = "qweight"
    groups: str = "g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups = num_groups(num_columns, self.group_size)
        return {
            "qweight": Tensor(("I32",), (num_columns // PER_WORD, num_rows)),
            "qzeros": Tensor(("I32",), (groups, num_rows // PER_WORD)),
            "scales": Tensor(FLOATS, (groups, num_rows)),
        }

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        q = unpack_words(np.ascontiguousarray(get("qweight").T))
        zero = (unpack_words(get("qzeros")) + np.uint8(self.zero_offset)) & np.uint8(15)
        scale = np.ascontiguousarray(get("scales").T)
        return PackedLinear(q, scale, np.ascontiguousarray(zero.T))


@dataclass(frozen=True)
class CompressedTensors:
    group_size: int
    is_symmetric: bool
    marker: str = "weight_packed"
    groups: str = "weight_g_idx"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Tensor]:
        groups = num_groups(num_columns, self.group_size)
        found = {
            "weight_packed": Tensor(("I32",), (num_rows, num_columns // PER_WORD)),
            "weight_scale": Tensor(FLOATS, (num_rows, groups)),
            "weight_shape": Tensor(("I64", "I32"), (2,)),
        }
        if not self.is_symmetric:
            found["weight_zero_point"] = Tensor(("I32",), (num_rows // PER_WORD, groups))
        return found

    def unpack(self, get: Callable[[str], Array]) -> PackedLinear:
        scale = get("weight_scale")
        zero = np.full(scale.shape, 8, np.uint8)
        if not self.is_symmetric:
            zero = np.ascontiguousarray(unpack_words(np.ascontiguousarray(get("weight_zero_point").T)).T)
        return PackedLinear(unpack_words(get("weight_packed")), scale, zero)


def num_groups(num_columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-num_columns // group_size)


def native_group_size(num_columns: int, group_size: int) -> int | None:
    """The largest that INT4 has and that a group is made of; None: there is none."""
    size = num_columns if group_size == -1 else group_size
    return next(
        (each for each in sorted(GROUP_SIZES, reverse=True) if size % each == 0 and num_columns % size == 0), None
    )


def unpack_words(words: npt.NDArray[np.int32]) -> Bytes:
    """(rows, columns) int32 -> new (rows, 8 columns), number i of a word at place i."""
    shifts = np.arange(0, 4 * PER_WORD, 4, dtype=np.uint32)
    numbers = np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(15)
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


def to_int4(packed: PackedLinear, order: npt.NDArray[np.int32] | None, group_size: int) -> Int4Rows:
    """With groups of group_size, the columns in this order (column j is order[j] of the linear)."""
    repeats = packed.q.shape[1] // packed.scale.shape[1] // group_size
    with np.errstate(over="ignore"):
        scale = packed.scale.astype(np.float16)
        minimum = (scale.astype(np.float32) * -packed.zero.astype(np.float32)).astype(np.float16)
    q = packed.q if order is None else np.ascontiguousarray(packed.q[:, order])
    return Int4Rows(q, np.repeat(scale, repeats, axis=1), np.repeat(minimum, repeats, axis=1))


def _in_places(numbers: Bytes, places: tuple[int, ...]) -> Bytes:
    """Of each eight, number i goes to places[i]."""
    eights = numbers.reshape(len(numbers), -1, PER_WORD)
    return eights[:, :, np.argsort(places)].reshape(numbers.shape)
