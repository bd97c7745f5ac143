"""Stored GGUF tensors as the rows of INT4 and INT8 linears, before they are packed.

A matrix is a tuple of arrays with one leading row axis, so that reordering, joining and interleaving rows is the same
for both formats. Q4_0 and Q4_1 become INT4 with groups of 32 without loss (see `kernels/interface.py`: Q4_0's minimum
is -8 scale); Q8_0 and Q4_0 become INT8 with groups of 32 without loss. Anything else becomes INT8 by rounding to
nearest, scale = max |w| / 127.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, UnsupportedModelError
from nibble.engine.checkpoint.ggml_types import DEQUANTIZABLE, Floats, split_q4_0, split_q4_1, split_q8_0
from nibble.engine.checkpoint.gguf import GGUFFile

GROUP_SIZE = 32  # GGUF's block
INT4_TYPES = ("Q4_0", "Q4_1")
LOSSLESS_INT8_TYPES = ("Q4_0", "Q8_0")
_CHUNK_VALUES = 1 << 24  # rounded at a time: 64 MiB as float32

RowArrays: TypeAlias = tuple[npt.NDArray[Any], ...]


def int4_rows(file: GGUFFile, name: str) -> RowArrays:
    """(q uint8 (N, K), scale fp16 (N, K / 32), minimum fp16 (N, K / 32)) of a Q4_0 or Q4_1 tensor."""
    blocks = file.blocks(name)  # (N, K / 32, bytes)
    if file.tensor(name).kind.name == "Q4_1":
        q, scale, minimum = split_q4_1(blocks)
    else:
        q, scale = split_q4_0(blocks)
        with np.errstate(over="ignore", invalid="ignore"):
            minimum = scale * np.float16(-8)  # exact unless it overflows, which is refused below
    _check_finite(file, name, scale, minimum)
    return q.reshape(q.shape[0], -1), scale[..., 0], minimum[..., 0]


def int8_rows(file: GGUFFile, name: str) -> RowArrays:
    """(values int8 (N, K), scales fp16 (N, K / 32)) of a tensor of any supported type."""
    kind = file.tensor(name).kind.name
    if kind in LOSSLESS_INT8_TYPES:
        blocks = file.blocks(name)
        if kind == "Q8_0":
            values, scales = split_q8_0(blocks)
        else:
            nibbles, scales = split_q4_0(blocks)
            values = nibbles.view(np.int8) - np.int8(8)
        _check_finite(file, name, scales)
        return values.reshape(values.shape[0], -1), scales[..., 0]
    return _rounded_rows(file, name)


def require_readable(file: GGUFFile, name: str) -> None:
    """Raise UnsupportedModelError for a linear or embedding that `int4_rows` and `int8_rows` cannot take."""
    tensor = file.tensor(name)
    if tensor.kind.name not in DEQUANTIZABLE:
        raise UnsupportedModelError(
            f"{file.path.name}: tensor {name} is {tensor.kind.name}; supported are {', '.join(DEQUANTIZABLE)}"
        )
    if tensor.shape[-1] % GROUP_SIZE:
        raise UnsupportedModelError(
            f"{file.path.name}: tensor {name} has rows of {tensor.shape[-1]}, not a multiple of {GROUP_SIZE}"
        )


def _rounded_rows(file: GGUFFile, name: str) -> RowArrays:
    num_rows, num_columns = file.tensor(name).shape
    values = np.empty((num_rows, num_columns), np.int8)
    scales = np.empty((num_rows, num_columns // GROUP_SIZE), np.float16)
    chunk = max(1, _CHUNK_VALUES // num_columns)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        values[rows], scales[rows] = round_to_int8(file.dequantized(name, rows))
        _check_finite(file, name, scales[rows])
    return values, scales


def round_to_int8(weights: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Values (N, K) and scales (N, K / 32) of float32 (N, K). A weight that is not finite gives a scale that is not."""
    groups = weights.reshape(weights.shape[0], -1, GROUP_SIZE)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = (np.abs(groups).max(axis=2) / np.float32(127)).astype(np.float16)
        steps = scales.astype(np.float32)[:, :, None]
        quotients = np.where(steps > 0, groups / steps, np.float32(0))
        values = np.clip(np.rint(quotients), -127, 127).astype(np.int8)  # the fp16 scale may be a little too small
    return values.reshape(weights.shape), scales


def _check_finite(file: GGUFFile, name: str, *arrays: npt.NDArray[np.float16]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ConversionError(f"{file.path.name}: tensor {name} has weights that are infinite, NaN or beyond fp16")
