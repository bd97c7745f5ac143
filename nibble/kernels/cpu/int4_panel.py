"""64 rows of INT4 weights as bf16 tiles, the B operand of `amx.py`: columns in pairs, rows in lanes.

Nibbles i and i + 4 of a word are two neighbouring columns of one row, a pair as the tile wants it. What is left is to
bring the 16 rows of a fragment, which lie 4 to a vector, side by side: a 4 x 4 transposition of groups of lanes.
"""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import amx
from nibble.kernels.cpu.int4_fragment import SCALE_BYTES, one_plus_nibble, row_scales
from nibble.kernels.cpu.jit import inline_jit
from nibble.kernels.cpu.vector_ir import I32X16, LANES, VECTOR_BYTES, call_fma, load_at, shuffle, store_at, unpack_tuple
from nibble.kernels.layout import FRAGMENT, TILE_COLUMNS, TILE_ROWS

ROW_FRAGMENTS = TILE_ROWS // FRAGMENT
FRAGMENT_BYTES = FRAGMENT * FRAGMENT // 2


@intrinsic
def unpack_fragment(typingctx: Any, words: Any, low_scales: Any, high_scales: Any, out: Any) -> Any:
    """Half a B tile: 8 column pairs (64 bytes each, to address out) of the 16 rows of the fragment at words, w / 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = [load_at(builder, args[0], I32X16, half * VECTOR_BYTES, align=4) for half in range(2)]
        scales = [unpack_tuple(builder, args[1 + half], 4) for half in range(2)]
        for column_half in range(2):
            rows = []
            for row in range(2):
                for half in range(2):
                    nibble = row + 2 * column_half
                    scale, offset = scales[half][2 * row : 2 * row + 2]
                    pair = [one_plus_nibble(builder, halves[half], i) for i in (nibble, nibble + 4)]
                    weights = [call_fma(builder, value, scale, offset) for value in pair]
                    rows.append(amx.bfloat16_pairs(builder, *weights))
            for i, pairs in enumerate(transpose_fours(builder, rows)):
                store_at(builder, args[3], pairs, (4 * column_half + i) * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, low_scales, high_scales, types.intp), codegen


def transpose_fours(builder: Any, rows: list[Any]) -> list[Any]:
    """Vector c: lane 4 q + r is lane 4 r + c of vector q."""
    halves = []
    for columns in ((0, 1), (2, 3)):
        lanes = [source * LANES + 4 * r + c for c in columns for source in range(2) for r in range(4)]
        halves.append([shuffle(builder, rows[q], rows[q + 1], lanes) for q in (0, 2)])
    out = []
    for first, second in halves:
        for start in (0, 8):
            lanes = [source * LANES + start + i for source in range(2) for i in range(8)]
            out.append(shuffle(builder, first, second, lanes))
    return out


@inline_jit
def unpack_row_tile(tile, num_columns, group_size, out):
    """out: for each 32 columns the 4 B tiles of the 64 rows of the row tile at an address, times 1 / 16."""
    for column in range(0, num_columns, TILE_COLUMNS):
        width = min(TILE_COLUMNS, num_columns - column)
        fragment_bytes = width // FRAGMENT * FRAGMENT_BYTES
        scales = tile + ROW_FRAGMENTS * fragment_bytes
        for r in range(ROW_FRAGMENTS):
            words = tile + r * fragment_bytes
            row = scales + r * FRAGMENT * SCALE_BYTES
            for f in range(width // FRAGMENT):
                group = row + f * FRAGMENT // group_size * TILE_ROWS * SCALE_BYTES
                step = (column + f * FRAGMENT) // amx.TILE_DEPTH
                place = out + (step * ROW_FRAGMENTS + r) * amx.TILE_BYTES + f % 2 * amx.TILE_BYTES // 2
                unpack_fragment(words, row_scales(group), row_scales(group + 4 * SCALE_BYTES), place)
                words += FRAGMENT_BYTES
        tile = scales + width // group_size * TILE_ROWS * SCALE_BYTES
