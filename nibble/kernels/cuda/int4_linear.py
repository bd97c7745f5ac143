"""Launcher of `int4_linear.cu`, and the choice of implementation by mode and device; what is computed: `interface.py`.

DECODE: a fused kernel, int4_linear.cu unless the device's architecture has one of its own. PREFILL: the weight is
dequantised to a scratch matrix (the same fp16 values) that cuBLASLt multiplies, see `gemm.py`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from nibble.kernels.cuda import gemm, int4_mma
from nibble.kernels.cuda.arrivals import take_arrivals
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.int4_dequantize import int4_dequantize
from nibble.kernels.cuda.int4_wgmma import int4_wgmma
from nibble.kernels.cuda.linear_arguments import check_arguments
from nibble.kernels.interface import Array, Int4Weight, Mode
from nibble.kernels.layout import GROUP_SIZES, TILE_COLUMNS, TILE_ROWS, int4_num_bytes

VARIANTS: tuple[Defines, ...] = tuple((("GROUP_SIZE", size),) for size in GROUP_SIZES)

MAX_TOKENS = 64  # of a thread block; more are cut into chunks
THREADS = 128
# Blocks that a launch is cut into along K, at least: several for each of an H100's 132 multiprocessors. A constant and
# not the device's number, so that the order of additions is the same on all.
MIN_BLOCKS = 528


@dataclass(frozen=True)
class _Shape:
    """A kernel of int4_linear.cu."""

    max_tokens: int
    row_fragments: int  # of a warp
    num_stages: int

    @property
    def name(self) -> str:
        return f"int4_linear_{self.max_tokens}"

    def shared_bytes(self, group_size: int) -> int:
        weight_bytes = self.row_fragments * int4_num_bytes(TILE_ROWS, TILE_COLUMNS, group_size)
        return self.num_stages * (weight_bytes + self.max_tokens * TILE_COLUMNS * 2)

    def sums_per_block(self) -> int:
        return self.row_fragments * TILE_ROWS * self.max_tokens


_SHAPES = (_Shape(8, 1, 6), _Shape(16, 1, 5), _Shape(32, 2, 4), _Shape(64, 2, 3))  # as at the end of int4_linear.cu


def int4_linear(
    device: Device,
    x: Array,
    weight: Int4Weight,
    bias: Array | None = None,
    residual: Array | None = None,
    mode: Mode = Mode.DECODE,
    gated: bool = False,
) -> Array:
    check_arguments(x, weight.out_features, weight.in_features, bias, residual, gated)
    num_tokens, num_bytes = x.shape[0], int4_num_bytes(weight.out_features, weight.in_features, weight.group_size)
    assert weight.packed.nbytes == num_bytes, f"the weight has {weight.packed.nbytes} bytes, expected {num_bytes}"
    if mode is Mode.PREFILL and num_tokens:
        rows = functools.partial(int4_dequantize, device, weight)
        return gemm.linear(device, x, rows, weight.out_features, bias, residual, gated)
    out = residual
    if out is None:
        out = device.empty((num_tokens, weight.out_features // (2 if gated else 1)), np.float16)
    if num_tokens:
        launch = LAUNCHERS.get(device.architecture, int4_general)
        launch(device, x, weight, bias, out, gated)
    return out


def num_tiles_per_slice(num_rows: int, num_columns: int) -> int:
    """Column tiles that are added up in one go: what the order of additions depends on."""
    row_tiles, tiles = -(-num_rows // TILE_ROWS), -(-num_columns // TILE_COLUMNS)
    num_slices = min(tiles, -(-MIN_BLOCKS // row_tiles))
    return -(-tiles // num_slices)


def int4_hopper(device: Device, x: Array, weight: Int4Weight, bias: Array | None, out: Array, gated: bool) -> None:
    """As `int4_general`, on sm_90a; its two kernels give the same bits."""
    if x.shape[0] <= int4_mma.MAX_TOKENS and weight.in_features % int4_mma.PANEL_COLUMNS == 0:
        int4_mma.int4_mma(device, x, weight, bias, out, gated)
    else:
        int4_wgmma(device, x, weight, bias, out, gated)


def int4_general(device: Device, x: Array, weight: Int4Weight, bias: Array | None, out: Array, gated: bool) -> None:
    """`int4_linear` on any device, with the arguments checked; out is fp16, or the float32 residual."""
    num_tokens, num_columns = x.shape
    tiles_per_slice = num_tiles_per_slice(weight.out_features, num_columns)
    num_slices = -(-num_columns // (tiles_per_slice * TILE_COLUMNS))
    shape = next((shape for shape in _SHAPES if num_tokens <= shape.max_tokens), _SHAPES[-1])
    chunks = -(-num_tokens // MAX_TOKENS)
    row_blocks = -(-weight.out_features // (shape.row_fragments * TILE_ROWS))
    has_residual = out.dtype == np.float32
    with device.arena.scope():
        partials, arrivals = None, None
        if num_slices > 1:
            partials = device.empty((num_slices * row_blocks * chunks * shape.sums_per_block(),), np.float32)
            arrivals = take_arrivals(device, row_blocks * chunks)
        device.kernel("int4_linear", shape.name, (("GROUP_SIZE", weight.group_size),)).launch(
            (chunks, row_blocks, num_slices),
            THREADS,
            *(x, weight.packed, bias, None if has_residual else out, out if has_residual else None),
            *(partials, arrivals, np.int32(num_tokens), np.int32(weight.out_features), np.int32(num_columns)),
            *(np.int32(tiles_per_slice), np.int32(gated)),
            shared_bytes=shape.shared_bytes(weight.group_size),
        )


LAUNCHERS = {"sm_90a": int4_hopper}  # other devices use int4_general
