"""The storage formats against layout.py's prose, spelt out in loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.kernels.layout import int4_num_bytes
from nibble.kernels.pack import (
    deinterleave_gate_up,
    dequantize_int4,
    interleave_gate_up,
    pack_int4,
    unpack_int4,
)


def random_int4(
    rng: np.random.Generator, rows: int, columns: int, group_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    groups = columns // group_size
    return (
        rng.integers(0, 16, (rows, columns), dtype=np.uint8),
        rng.standard_normal((rows, groups)).astype(np.float16),
        rng.standard_normal((rows, groups)).astype(np.float16),
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    group_size = draw(st.sampled_from((32, 64, 128)))
    return draw(st.integers(1, 200)), group_size * draw(st.integers(1, 9)), group_size


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1))
def test_unpack_returns_what_was_packed(shape: tuple[int, int, int], seed: int) -> None:
    rows, columns, group_size = shape
    q, scale, minimum = random_int4(np.random.default_rng(seed), rows, columns, group_size)
    packed = pack_int4(q, scale, minimum)
    assert packed.dtype == np.uint8
    assert packed.shape == (int4_num_bytes(rows, columns, group_size),)
    for got, expected in zip(unpack_int4(packed, rows, columns, group_size), (q, scale, minimum), strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(64, 128, 128), (70, 32, 32), (130, 96, 32), (65, 576, 32), (64, 192, 64)]
)
def test_packed_bytes_follow_the_specification(rows: int, columns: int, group_size: int) -> None:
    q, scale, minimum = random_int4(np.random.default_rng(0), rows, columns, group_size)
    packed = pack_int4(q, scale, minimum)
    padded = -(-rows // 64) * 64
    matrix = np.zeros((padded, columns), np.uint8)
    matrix[:rows] = q
    position = 0
    for row_tile in range(0, padded, 64):
        for column_tile in range(0, columns, 128):
            width = min(128, columns - column_tile)
            for row in range(row_tile, row_tile + 64, 16):
                for column in range(column_tile, column_tile + width, 16):
                    for lane in range(32):
                        word = int.from_bytes(packed[position : position + 4].tobytes(), "little")
                        position += 4
                        r0, c0 = row + lane // 4, column + 2 * (lane % 4)
                        r1 = r0 + 8
                        order = ((r0, c0), (r1, c0), (r0, c0 + 8), (r1, c0 + 8))
                        order += ((r0, c0 + 1), (r1, c0 + 1), (r0, c0 + 9), (r1, c0 + 9))
                        assert [word >> 4 * i & 15 for i in range(8)] == [matrix[place] for place in order]
            for group in range(column_tile // group_size, (column_tile + width) // group_size):
                for row in range(row_tile, row_tile + 64):
                    pair = packed[position : position + 4].view("<f2")
                    position += 4
                    expected = (scale[row, group], minimum[row, group]) if row < rows else (0, 0)
                    assert tuple(pair) == expected
    assert position == packed.size


def test_dequantized_matrix_is_scale_times_q_plus_minimum() -> None:
    q, scale, minimum = random_int4(np.random.default_rng(1), 50, 96, 32)
    got = dequantize_int4(pack_int4(q, scale, minimum), 50, 96, 32)
    expected = scale.astype(np.float64).repeat(32, 1) * q + minimum.astype(np.float64).repeat(32, 1)
    # two roundings to fp32 of terms of at most 15 * |scale| + |minimum|
    bound = 2.0**-23 * (15 * np.abs(scale).astype(np.float64) + np.abs(minimum)).repeat(32, 1)
    assert (np.abs(got - expected) <= bound).all()


def test_gate_and_up_rows_alternate_in_runs_of_eight() -> None:
    gate = np.arange(48).reshape(24, 2)
    up = gate + 100
    merged = interleave_gate_up(gate, up)
    for neuron in range(24):
        run, offset = divmod(neuron, 8)
        np.testing.assert_array_equal(merged[16 * run + offset], gate[neuron])
        np.testing.assert_array_equal(merged[16 * run + 8 + offset], up[neuron])
    for got, expected in zip(deinterleave_gate_up(merged), (gate, up), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_columns_that_do_not_fill_groups_are_refused() -> None:
    with pytest.raises(AssertionError, match="group size"):
        pack_int4(np.zeros((64, 48), np.uint8), np.zeros((64, 3), np.float16), np.zeros((64, 3), np.float16))
    with pytest.raises(AssertionError, match="bytes, expected"):
        unpack_int4(np.zeros(10, np.uint8), 64, 32, 32)
