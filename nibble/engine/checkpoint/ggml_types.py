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


def split_q5_0(blocks: Bytes) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Values (..., 32) in -16..15 and scales (..., 1) of blocks (..., 22): w = scale * value."""
    fifth = _fifth_bits(blocks[..., 2:6])
    return (_nibbles(blocks[..., 6:22]) | fifth << np.uint8(4)).view(np.int8) - np.int8(16), _half(blocks, 0)


def split_q4_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Nibbles (..., 256), scales (..., 8) and minima (..., 8) of blocks (..., 144): w = scale * nibble + minimum."""
    scale, minimum = _k_scales(blocks)
    return _k_nibbles(blocks[..., 16:144]), scale, minimum


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


def _fifth_bits(packed: Bytes) -> Bytes:
    """One bit for each of 32 values, little-endian."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little")


def _k_nibbles(packed: Bytes) -> Bytes:
    """Runs of 64 values: 32 bytes whose low nibbles come first."""
    runs = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    nibbles = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=-2)
    return nibbles.reshape(*packed.shape[:-1], 256)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima (..., 8) of 32 values each: two fp16, then eight scales and eight minima of 6 bits in 12 bytes.

    Of the first four the 6 bits are the low ones of bytes 0..3 (scales) and 4..7 (minima); of the others the low 4 bits
    are the nibbles of bytes 8..11, the high 2 the high bits of bytes 0..3 and 4..7.
    """
    low, middle, last = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, (last & 15) | (low >> 6) << 4], axis=-1)
    minima = np.concatenate([middle & 63, last >> 4 | (middle >> 6) << 4], axis=-1)
    scale = _half(blocks, 0).astype(np.float32) * scales.astype(np.float32)
    return scale, -_half(blocks, 2).astype(np.float32) * minima.astype(np.float32)


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


def _q5_0(blocks: Bytes) -> Floats:
    values, scale = split_q5_0(blocks)
    return scale.astype(np.float32) * values.astype(np.float32)


def _q5_1(blocks: Bytes) -> Floats:
    values = _nibbles(blocks[..., 8:24]) | _fifth_bits(blocks[..., 4:8]) << np.uint8(4)
    return _half(blocks, 0).astype(np.float32) * values.astype(np.float32) + _half(blocks, 2).astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    nibbles, scale, minimum = split_q4_k(blocks)
    return _k_values(nibbles, scale, minimum)


def _q5_k(blocks: Bytes) -> Floats:
    """As Q4_K, and between scales and nibbles 32 bytes of fifth bits: bit r of byte i is value i of run r."""
    scale, minimum = _k_scales(blocks)
    runs = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[..., None, 16:48] >> runs & np.uint8(1)).reshape(*blocks.shape[:-1], 256)
    return _k_values(_k_nibbles(blocks[..., 48:176]) | fifth << np.uint8(4), scale, minimum)


def _k_values(integers: Bytes, scale: Floats, minimum: Floats) -> Floats:
    runs = integers.reshape(*scale.shape, 32).astype(np.float32)
    return (scale[..., None] * runs + minimum[..., None]).reshape(integers.shape)


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
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
