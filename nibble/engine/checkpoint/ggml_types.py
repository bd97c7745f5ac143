"""GGUF's tensor types: their numbers, block sizes and, for those that Nibble converts, dequantisation in numpy.

Every type that llama.cpp writes to files is known by name and size, so that a file's layout can be checked and an
unsupported tensor refused by name; only `DEQUANTIZABLE` ones can be read as numbers. A row is a whole number of blocks.

Source: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h (blocks) and gguf-py/gguf/constants.py (numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GGMLType:
    """One storage type: `block_values` numbers take `block_bytes` bytes."""

    name: str
    block_values: int
    block_bytes: int


GGML_TYPES: dict[int, GGMLType] = {
    number: GGMLType(name, block_values, block_bytes)
    for number, name, block_values, block_bytes in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
}


def split_q4_0(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float16]]:
    """Nibbles (..., 32) in 0..15 and scales (..., 1) of blocks (..., 18): w = scale * (nibble - 8)."""
    return _nibbles(blocks[..., 2:18]), _half(blocks, 0)


def split_q4_1(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Nibbles (..., 32), scales (..., 1) and minima (..., 1) of blocks (..., 20): w = scale * nibble + minimum."""
    return _nibbles(blocks[..., 4:20]), _half(blocks, 0), _half(blocks, 2)


def split_q8_0(blocks: Bytes) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Values (..., 32) and scales (..., 1) of blocks (..., 34): w = scale * value."""
    return blocks[..., 2:34].view(np.int8), _half(blocks, 0)


def dequantize(data: Bytes, kind: GGMLType) -> Floats:
    """The numbers of `data` uint8 (rows, bytes per row) as new float32 (rows, values per row)."""
    blocks = data.reshape(data.shape[0], -1, kind.block_bytes)
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file has infinities, which the caller looks for
        return DEQUANTIZABLE[kind.name](blocks).reshape(data.shape[0], -1)


def _half(blocks: Bytes, offset: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")


def _nibbles(packed: Bytes) -> Bytes:
    """All low nibbles of a block come before its high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    nibbles, scale = split_q4_0(blocks)
    return scale.astype(np.float32) * (nibbles.astype(np.float32) - np.float32(8))


def _q4_1(blocks: Bytes) -> Floats:
    nibbles, scale, minimum = split_q4_1(blocks)
    return scale.astype(np.float32) * nibbles.astype(np.float32) + minimum.astype(np.float32)


def _q8_0(blocks: Bytes) -> Floats:
    values, scale = split_q8_0(blocks)
    return scale.astype(np.float32) * values.astype(np.float32)


def _q6_k(blocks: Bytes) -> Floats:
    """256 values in 16 runs of 16: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 run scales, one fp16."""
    leading = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*leading, 2, 1, 64)  # two halves of 128 values
    low = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=-2).reshape(*leading, 256)
    high = blocks[..., 128:192].reshape(*leading, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = ((high >> shifts) & np.uint8(3)).reshape(*leading, 256)
    values = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    run_scales = blocks[..., 192:208].view(np.int8).astype(np.float32)
    scales = _half(blocks, 208).astype(np.float32) * run_scales  # (..., 16)
    return (scales[..., None] * values.reshape(*leading, 16, 16)).reshape(*leading, 256)


DEQUANTIZABLE: dict[str, Callable[[Bytes], npt.NDArray[Any]]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
}
