"""Arrays to and from the storage formats of `layout.py`, vectorised, numpy only.

What a checkpoint writer needs (pack, interleave) and what tests and slow paths need (unpack, dequantise). The byte
order itself is specified in `layout.py`; nothing here runs while tokens are generated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nibble.kernels.layout import (
    FRAGMENT,
    GATE_UP_INTERLEAVE,
    GROUP_SIZES,
    TILE_COLUMNS,
    TILE_ROWS,
    int4_num_bytes,
)

UInt8Array = npt.NDArray[np.uint8]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]

ROW_FRAGMENTS = TILE_ROWS // FRAGMENT
SCALE_BYTES = 4  # (scale, minimum), fp16 each


def pack_int4(q: npt.NDArray[np.uint8], scale: Float16Array, minimum: Float16Array) -> UInt8Array:
    """The tiles of a matrix: q uint8 (N, K) in 0..15, scale and minimum fp16 (N, K / group_size) -> uint8 (bytes,)."""
    num_rows, num_columns = q.shape
    num_groups = scale.shape[1]
    assert scale.shape == minimum.shape == (num_rows, num_groups), "scale and minimum must be (N, K / group_size)"
    assert num_columns % max(num_groups, 1) == 0, f"{num_groups} groups do not divide {num_columns} columns"
    group_size = num_columns // max(num_groups, 1)
    _check_shape(num_columns, group_size)
    assert q.dtype == np.uint8, f"q is {q.dtype}, expected uint8"
    assert int(q.max(initial=0)) < 16, "q must be in 0..15"
    row_tiles = -(-num_rows // TILE_ROWS)
    padding = ((0, row_tiles * TILE_ROWS - num_rows), (0, 0))
    q = np.pad(q, padding)
    pairs = np.stack(
        (np.pad(scale.astype(np.float16), padding), np.pad(minimum.astype(np.float16), padding)), axis=-1
    )  # (padded N, groups, 2)
    packed = np.empty((row_tiles, int4_num_bytes(TILE_ROWS, num_columns, group_size)), np.uint8)
    for span in _column_spans(num_columns, group_size):
        tiles = packed[:, span.start_byte : span.stop_byte].reshape(row_tiles, span.num_tiles, span.tile_bytes)
        nibbles = _nibbles_to_fragments(q[:, span.start_column : span.stop_column], span.width)
        tiles[:, :, : span.nibble_bytes] = nibbles
        groups = pairs[:, span.start_column // group_size : span.stop_column // group_size]
        groups = groups.reshape(row_tiles, TILE_ROWS, span.num_tiles, -1, 2).transpose(0, 2, 3, 1, 4)
        # (row tile, column tile, group in tile, row, scale | minimum)
        scale_bytes = np.ascontiguousarray(groups, dtype="<f2").view(np.uint8)
        tiles[:, :, span.nibble_bytes :] = scale_bytes.reshape(row_tiles, span.num_tiles, -1)
    return packed.reshape(-1)


def unpack_int4(
    packed: UInt8Array, num_rows: int, num_columns: int, group_size: int
) -> tuple[UInt8Array, Float16Array, Float16Array]:
    """What `pack_int4` was given: q uint8 (N, K), scale and minimum fp16 (N, K / group_size), all new arrays."""
    _check_shape(num_columns, group_size)
    expected = int4_num_bytes(num_rows, num_columns, group_size)
    assert packed.nbytes == expected, f"packed matrix has {packed.nbytes} bytes, expected {expected}"
    row_tiles = -(-num_rows // TILE_ROWS)
    rows = packed.reshape(row_tiles, -1)
    q = np.empty((row_tiles * TILE_ROWS, num_columns), np.uint8)
    pairs = np.empty((row_tiles * TILE_ROWS, num_columns // group_size, 2), np.float16)
    for span in _column_spans(num_columns, group_size):
        tiles = rows[:, span.start_byte : span.stop_byte].reshape(row_tiles, span.num_tiles, span.tile_bytes)
        q[:, span.start_column : span.stop_column] = _fragments_to_nibbles(
            np.ascontiguousarray(tiles[:, :, : span.nibble_bytes]), span.width
        )
        groups = np.ascontiguousarray(tiles[:, :, span.nibble_bytes :]).view("<f2")
        groups = groups.reshape(row_tiles, span.num_tiles, -1, TILE_ROWS, 2).transpose(0, 3, 1, 2, 4)
        # (row tile, row, column tile, group in tile, scale | minimum)
        pairs[:, span.start_column // group_size : span.stop_column // group_size] = groups.reshape(
            row_tiles * TILE_ROWS, -1, 2
        )
    return q[:num_rows], pairs[:num_rows, :, 0].copy(), pairs[:num_rows, :, 1].copy()


def dequantize_int4(packed: UInt8Array, num_rows: int, num_columns: int, group_size: int) -> Float32Array:
    """The matrix itself: scale * q + minimum in float32, (N, K)."""
    q, scale, minimum = unpack_int4(packed, num_rows, num_columns, group_size)
    w = q.reshape(num_rows, -1, group_size).astype(np.float32)
    w *= scale.astype(np.float32)[:, :, None]
    w += minimum.astype(np.float32)[:, :, None]
    return w.reshape(num_rows, num_columns)


def interleave_gate_up(gate: npt.NDArray[np.generic], up: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Rows of gate and up (each (I, ...), any dtype) as one new (2 * I, ...) array in runs of GATE_UP_INTERLEAVE."""
    assert gate.shape == up.shape, f"gate {gate.shape} and up {up.shape} must have one shape"
    assert gate.shape[0] % GATE_UP_INTERLEAVE == 0, f"{gate.shape[0]} rows, not a multiple of {GATE_UP_INTERLEAVE}"
    run = (-1, GATE_UP_INTERLEAVE, *gate.shape[1:])
    return np.stack((gate.reshape(run), up.reshape(run)), axis=1).reshape(2 * gate.shape[0], *gate.shape[1:])


def deinterleave_gate_up(
    gate_up: npt.NDArray[np.generic],
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """(gate, up), each (I, ...) and new, of an array (2 * I, ...) interleaved along its first axis."""
    assert gate_up.shape[0] % (2 * GATE_UP_INTERLEAVE) == 0, f"{gate_up.shape[0]} rows are not interleaved runs"
    runs = gate_up.reshape(-1, 2, GATE_UP_INTERLEAVE, *gate_up.shape[1:])
    half = (gate_up.shape[0] // 2, *gate_up.shape[1:])
    return np.ascontiguousarray(runs[:, 0]).reshape(half), np.ascontiguousarray(runs[:, 1]).reshape(half)


class _ColumnSpan:
    """A run of equally wide column tiles: the full ones, or the ragged last one."""

    def __init__(self, start_column: int, width: int, num_tiles: int, start_byte: int, group_size: int) -> None:
        self.start_column = start_column
        self.stop_column = start_column + width * num_tiles
        self.width = width
        self.num_tiles = num_tiles
        self.nibble_bytes = TILE_ROWS * width // 2
        self.tile_bytes = self.nibble_bytes + width // group_size * TILE_ROWS * SCALE_BYTES
        self.start_byte = start_byte  # within a row tile's run
        self.stop_byte = start_byte + num_tiles * self.tile_bytes


def _column_spans(num_columns: int, group_size: int) -> Iterator[_ColumnSpan]:
    full_tiles, ragged_width = divmod(num_columns, TILE_COLUMNS)
    full = _ColumnSpan(0, TILE_COLUMNS, full_tiles, 0, group_size)
    if full_tiles:
        yield full
    if ragged_width:
        yield _ColumnSpan(full.stop_column, ragged_width, 1, full.stop_byte, group_size)


def _nibbles_to_fragments(q: UInt8Array, width: int) -> UInt8Array:
    """q (row tiles * 64, tiles * width) -> fragment bytes (row tiles, tiles, 64 * width / 2)."""
    row_tiles, num_tiles = q.shape[0] // TILE_ROWS, q.shape[1] // width
    # row in tile = 16 * row fragment + 8 * row half + lane row
    # column in tile = 16 * column fragment + 8 * column half + 2 * lane column + odd
    split = q.reshape(row_tiles, ROW_FRAGMENTS, 2, 8, num_tiles, width // FRAGMENT, 2, 4, 2)
    # -> (row tile, tile, row fragment, column fragment, lane row, lane column, odd, column half, row half): the byte of
    # a word is 2 * odd + column half, its low nibble is row half 0
    ordered = split.transpose(0, 4, 1, 5, 3, 7, 8, 6, 2)
    packed: UInt8Array = ordered[..., 0] | (ordered[..., 1] << np.uint8(4))
    return packed.reshape(row_tiles, num_tiles, -1)


def _fragments_to_nibbles(fragments: UInt8Array, width: int) -> UInt8Array:
    row_tiles, num_tiles, _ = fragments.shape
    split = fragments.reshape(row_tiles, num_tiles, ROW_FRAGMENTS, width // FRAGMENT, 8, 4, 2, 2)
    ordered = np.stack((split & 0xF, split >> 4), axis=-1)  # row half last, as above
    return ordered.transpose(0, 2, 8, 4, 1, 3, 7, 5, 6).reshape(row_tiles * TILE_ROWS, num_tiles * width)


def _check_shape(num_columns: int, group_size: int) -> None:
    assert group_size in GROUP_SIZES, f"group size {group_size}, expected one of {GROUP_SIZES}"
    assert num_columns % group_size == 0, f"{num_columns} columns are not a multiple of the group size {group_size}"
    # A ragged tile holds whole groups only if it is a multiple of the group size, which the line above ensures.
