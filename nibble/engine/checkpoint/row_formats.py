"""Rows of a matrix from one storage format to another, and which format matrices have that become one.

INT4 stays INT4; where a matrix is joined of INT4 and others it becomes INT8. Integers are kept wherever the target
holds them: a symmetric INT4 (minimum = -8 scale) becomes INT8 without loss, and so do larger groups smaller ones.
Anything else becomes INT8 by rounding to nearest, scale = max |w| / 127 over GROUP_SIZE columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.source import Float16Rows, Floats, Int4Rows, Int8Rows, RowFormat, Rows, select_rows

GROUP_SIZE = 32  # of INT8, and what the columns of every matrix have to be a multiple of
_CHUNK_VALUES = 1 << 24  # rounded at a time: 64 MiB as float32


def common_format(formats: list[RowFormat]) -> RowFormat:
    """What matrices of these formats become where they are joined."""
    kinds = {each.kind for each in formats}
    if kinds == {"float16"}:
        return RowFormat("float16")
    if kinds == {"int4"}:
        return RowFormat("int4", min(each.group_size for each in formats))
    return RowFormat("int8", GROUP_SIZE)


def to_format(rows: Rows, target: RowFormat) -> Rows:
    """The same matrix in a format that `common_format` gave for it."""
    if isinstance(rows, Float16Rows):
        return rows if target.kind == "float16" else _rounded(rows)
    if isinstance(rows, Int8Rows):
        assert target.kind == "int8", "INT8 becomes nothing else"
        return Int8Rows(rows.values, _smaller_groups(rows.values, rows.scales, target.group_size))
    if target.kind == "int4":
        scale, minimum = (_smaller_groups(rows.q, part, target.group_size) for part in rows[1:])
        return Int4Rows(rows.q, scale, minimum)
    assert target.kind == "int8", "INT4 becomes INT8 or stays"
    with np.errstate(over="ignore"):
        is_symmetric = np.array_equal(rows.minimum, rows.scale * np.float16(-8))
    if not is_symmetric:
        return _rounded(rows)
    values = rows.q.view(np.int8) - np.int8(8)
    return Int8Rows(values, _smaller_groups(values, rows.scale, target.group_size))


def dequantize_rows(rows: Rows) -> Floats:
    """New float32 (N, K)."""
    if isinstance(rows, Float16Rows):
        return rows.values.astype(np.float32)
    integers, scale = rows[0], rows[1]
    groups = integers.reshape(len(integers), scale.shape[1], -1).astype(np.float32)
    groups *= scale.astype(np.float32)[:, :, None]
    if isinstance(rows, Int4Rows):
        groups += rows.minimum.astype(np.float32)[:, :, None]
    return groups.reshape(integers.shape)


def round_to_int8(weights: Floats) -> Int8Rows:
    """Groups of GROUP_SIZE. A weight that is not finite gives a scale that is not."""
    groups = weights.reshape(weights.shape[0], -1, GROUP_SIZE)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = (np.abs(groups).max(axis=2) / np.float32(127)).astype(np.float16)
        steps = scales.astype(np.float32)[:, :, None]
        quotients = np.where(steps > 0, groups / steps, np.float32(0))
        values = np.clip(np.rint(quotients), -127, 127).astype(np.int8)  # the fp16 scale may be a little too small
    return Int8Rows(values.reshape(weights.shape), scales)


def chunks_of(num_rows: int, num_columns: int) -> list[slice]:
    """Rows to be worked on at a time, where float32 of all would be too much."""
    step = max(1, _CHUNK_VALUES // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def empty_int8(num_rows: int, num_columns: int) -> Int8Rows:
    """To be filled chunk by chunk."""
    return Int8Rows(
        np.empty((num_rows, num_columns), np.int8), np.empty((num_rows, num_columns // GROUP_SIZE), np.float16)
    )


def _rounded(rows: Float16Rows | Int4Rows) -> Int8Rows:
    result = empty_int8(*rows[0].shape)
    for chunk in chunks_of(*rows[0].shape):
        part = round_to_int8(dequantize_rows(select_rows(rows, chunk)))
        result.values[chunk], result.scales[chunk] = part
    return result


def _smaller_groups(
    integers: npt.NDArray[np.generic], scale: npt.NDArray[np.float16], group_size: int
) -> npt.NDArray[np.float16]:
    """Each scale as often as its group has groups of group_size."""
    return np.repeat(scale, integers.shape[1] // scale.shape[1] // group_size, axis=1)
