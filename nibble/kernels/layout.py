"""Storage formats, specified in prose once: the INT4 tile order, INT8 rows and the KV block.

Writers (`engine/checkpoint`), the CPU backend and the CUDA kernels all point here. numpy only.

INT4 tiles
----------
A matrix w (N output rows, K input columns) is cut into tiles of 64 rows x 128 columns. Tiles are stored column tile
by column tile within a row tile: tile (r, c) comes right before tile (r, c + 1), so a row tile is one contiguous run.
N is padded with zero rows (q = 0, scale = minimum = 0) to a multiple of 64. K is not padded: the last column tile is
W = K mod 128 columns wide where K is no multiple of 128 (K must be a multiple of 32).

A tile of W columns is 64 * W / 2 bytes of nibbles, then the scales of its G = W / group_size groups (a group of 128
needs K to be a multiple of 128): G x 64 rows x (scale, minimum) as two little-endian fp16, group by group.

Nibbles are in the A-operand fragment order of `mma.m16n8k16`, so that a GPU thread loads its registers with no shuffle.
The tile is cut into fragments of 16 rows x 16 columns, stored row fragment by row fragment (4), within it column
fragment by column fragment (W / 16). A fragment is 32 little-endian 32-bit words, one per lane (thread of a warp).
Lane l covers rows r0 = l // 4 and r1 = r0 + 8 and columns c0 = 2 * (l % 4) and the three others c0 + 1, c0 + 8,
c0 + 9. Nibble i (bits 4i..4i+3) of its word is:

    i   0         1         2         3         4           5           6           7
        (r0, c0)  (r1, c0)  (r0, c0+8)(r1, c0+8)(r0, c0+1)  (r1, c0+1)  (r0, c0+9)  (r1, c0+9)

so that `(word >> 4j) & 0x000F000F`, j = 0..3, yields two neighbouring columns of one row in the two 16-bit halves:
exactly one fp16x2 register of the fragment (a0, a1, a2, a3 for j = 0, 1, 2, 3).

gate_up
-------
The MLP's gate and up projections are one matrix whose rows alternate in runs of GATE_UP_INTERLEAVE: 8 rows of gate,
the same 8 rows of up, the next 8 of gate ... A lane's r0 and r1 are then gate and up of the same neuron. The
intermediate size must be a multiple of 8.

INT8 rows
---------
Row-major int8 (N, K) and fp16 scales (N, K / group_size).

KV block
--------
A block holds BLOCK_SIZE tokens of one layer. Per (block, kv head), contiguous, with D = head_dim:

    int8:          K int8 (64, D) | V int8 (64, D) | K (scale, zero) fp16 (64, 2) | V (scale, zero) fp16 (64, 2)
    int8-channel:  K int8 (64, D) | V int8 (64, D)
    fp16:          K fp16 (64, D) | V fp16 (64, D)

INT8 is asymmetric, K after RoPE: zero = (min + max) / 2, scale = (max - min) / 255, then
q = clamp(round((x - zero) / scale), -128, 127) with ties to even; x ~ q * scale + zero.

int8 takes min and max over a token's head, and rounds zero and scale to fp16 first; q = 0 where scale is 0. A magnitude
beyond fp16's 65504 saturates.

int8-channel has the zeros and scales of each channel in the checkpoint: float32 (kv heads, K | V, scale | zero, D),
scales above 0. A value beyond the range that they were made of saturates, and is counted: it rounds to less than -128
or more than 128 (the range's upper end is at 127.5). NaN does so to -128: such blocks cannot say NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

BLOCK_SIZE = 64  # tokens per KV block
TILE_ROWS = 64
TILE_COLUMNS = 128
FRAGMENT = 16  # rows and columns of an mma.m16n8k16 A fragment
GATE_UP_INTERLEAVE = 8  # half a fragment: r0 is gate, r1 is up
GROUP_SIZES = (32, 64, 128)


class KVDtype(StrEnum):
    INT8 = "int8"
    INT8_CHANNEL = "int8-channel"
    FP16 = "fp16"


@dataclass(frozen=True)
class KVLayout:
    """The shape of one layer's KV blocks."""

    num_kv_heads: int
    head_dim: int
    dtype: KVDtype = KVDtype.INT8

    @property
    def head_block_bytes(self) -> int:
        """Bytes of one (block, kv head)."""
        if self.dtype is KVDtype.FP16:
            return 2 * BLOCK_SIZE * self.head_dim * 2
        parameter_bytes = 4 if self.dtype is KVDtype.INT8 else 0
        return 2 * BLOCK_SIZE * (self.head_dim + parameter_bytes)

    @property
    def channels_shape(self) -> tuple[int, int, int, int]:
        """Of the zeros and scales of int8-channel."""
        return (self.num_kv_heads, 2, 2, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.num_kv_heads * self.head_block_bytes


def int4_num_bytes(out_features: int, in_features: int, group_size: int) -> int:
    """Bytes of an INT4 matrix in tiles, row padding included."""
    padded_rows = -(-out_features // TILE_ROWS) * TILE_ROWS
    return padded_rows * (in_features // 2 + in_features // group_size * 4)
