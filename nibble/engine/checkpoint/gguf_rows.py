"""Stored GGUF tensors as rows of a matrix, integers kept wherever there is a format that holds them.

Q4_0, Q4_1 and Q4_K become INT4 with groups of 32: the first two without loss (Q4_0's minimum is -8 scale), the third
with its scales and minima, products of fp16 and 6 bits, rounded to fp16 (2^-11). Q8_0 and Q5_0 become INT8 with groups
of 32 without loss. Q5_1, Q5_K and Q6_K are rounded to INT8, which has more bits; F32, F16 and BF16 become fp16.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, UnsupportedModelError
from nibble.engine.checkpoint.ggml_types import (
    DEQUANTIZABLE,
    split_q4_0,
    split_q4_1,
    split_q4_k,
    split_q5_0,
    split_q8_0,
)
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.row_formats import GROUP_SIZE, chunks_of, empty_int8, round_to_int8
from nibble.engine.checkpoint.source import Float16Rows, Int4Rows, Int8Rows, RowFormat, Rows

_FORMATS = {
    **dict.fromkeys(("F32", "F16", "BF16"), RowFormat("float16")),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), RowFormat("int4", GROUP_SIZE)),
    **dict.fromkeys(("Q8_0", "Q5_0", "Q5_1", "Q5_K", "Q6_K"), RowFormat("int8", GROUP_SIZE)),
}


def row_format(file: GGUFFile, name: str) -> RowFormat:
    """Raises UnsupportedModelError for a type that `read_rows` cannot take."""
    kind = file.tensor(name).kind.name
    if kind not in _FORMATS:
        raise UnsupportedModelError(
            f"{file.path.name}: tensor {name} is {kind}; supported are {', '.join(DEQUANTIZABLE)}"
        )
    return _FORMATS[kind]


def read_rows(file: GGUFFile, name: str) -> Rows:
    """The matrix as `row_format` says. Raises ConversionError for numbers that fp16 does not hold."""
    form = row_format(file, name)
    if form.kind == "float16":
        return _float16_rows(file, name)
    if form.kind == "int4":
        return _int4_rows(file, name)
    return _int8_rows(file, name)


def _int4_rows(file: GGUFFile, name: str) -> Int4Rows:
    blocks = file.blocks(name)  # (N, blocks, bytes)
    kind = file.tensor(name).kind.name
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "Q4_1":
            q, scale, minimum = split_q4_1(blocks)
        elif kind == "Q4_K":
            q, exact_scale, exact_minimum = split_q4_k(blocks)
            scale, minimum = exact_scale.astype(np.float16), exact_minimum.astype(np.float16)
        else:
            q, scale = split_q4_0(blocks)
            minimum = scale * np.float16(-8)  # exact unless it overflows, which is refused below
    _check_finite(file, name, scale, minimum)
    num_rows = len(blocks)
    return Int4Rows(q.reshape(num_rows, -1), scale.reshape(num_rows, -1), minimum.reshape(num_rows, -1))


def _int8_rows(file: GGUFFile, name: str) -> Int8Rows:
    kind = file.tensor(name).kind.name
    if kind not in ("Q8_0", "Q5_0"):
        return _rounded_rows(file, name)
    split = split_q8_0 if kind == "Q8_0" else split_q5_0
    values, scales = split(file.blocks(name))
    _check_finite(file, name, scales)
    return Int8Rows(values.reshape(len(values), -1), scales[..., 0])


def _rounded_rows(file: GGUFFile, name: str) -> Int8Rows:
    result = empty_int8(*file.tensor(name).shape)
    for chunk in chunks_of(*file.tensor(name).shape):
        result.values[chunk], result.scales[chunk] = round_to_int8(file.dequantized(name, chunk))
        _check_finite(file, name, result.scales[chunk])
    return result


def _float16_rows(file: GGUFFile, name: str) -> Float16Rows:
    values = np.empty(file.tensor(name).shape, np.float16)
    for chunk in chunks_of(*values.shape):
        with np.errstate(over="ignore"):
            values[chunk] = file.dequantized(name, chunk)
        _check_finite(file, name, values[chunk])
    return Float16Rows(values)


def _check_finite(file: GGUFFile, name: str, *arrays: npt.NDArray[np.float16]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ConversionError(f"{file.path.name}: tensor {name} has weights that are infinite, NaN or beyond fp16")
