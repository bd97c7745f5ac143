"""Launches int4_wgmma.cu (sm_90a)."""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from nibble.kernels.cuda.arrivals import take_arrivals
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.tensor_map import panel_map
from nibble.kernels.interface import Int4Weight
from nibble.kernels.layout import GROUP_SIZES, TILE_COLUMNS, TILE_ROWS, int4_num_bytes

VARIANTS: tuple[Defines, ...] = tuple((("GROUP_SIZE", size),) for size in GROUP_SIZES)

CLUSTER = 2  # thread blocks of a worker
THREADS = 5 * 128
# As in int4_hopper.cuh: what the order of additions depends on, with the number of slices' pairs
_MAX_RUNS = 66
_PAIRS = 4
_GROUP_ROWS = 4 * TILE_ROWS
_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True)
class _Shape:
    """A kernel of int4_wgmma.cu, which has the same formula."""

    num_tokens: int

    def shared_bytes(self, group_size: int) -> int:
        weight_bytes = 2 * int4_num_bytes(TILE_ROWS, TILE_COLUMNS, group_size)
        stage_bytes = self.num_tokens * TILE_COLUMNS * 2 + weight_bytes + 2 * 8
        other_bytes = self.num_tokens * 512 + 8
        return (_SHARED_BYTES - other_bytes) // stage_bytes * stage_bytes + other_bytes


_SHAPES = (_Shape(32), _Shape(64))


def int4_wgmma(
    device: Device, x: cupy.ndarray, weight: Int4Weight, bias: cupy.ndarray | None, out: cupy.ndarray, gated: bool
) -> None:
    """`int4_linear` with the arguments checked; out is fp16, or the float32 residual."""
    num_tokens, num_rows, num_columns = x.shape[0], weight.out_features, weight.in_features
    shape = next((shape for shape in _SHAPES if num_tokens <= shape.num_tokens), _SHAPES[-1])
    chunks, workers = -(-num_tokens // shape.num_tokens), min(_MAX_RUNS, -(-num_rows // _GROUP_ROWS) * _PAIRS)
    has_residual = out.dtype == np.float32
    with device.arena.scope():
        # for each worker the ends of a run that share a row group with others: at most two
        partials = device.empty((chunks * workers * 2 * _GROUP_ROWS * shape.num_tokens,), np.float32)
        kernel = device.kernel("int4_wgmma", f"int4_wgmma_{shape.num_tokens}", (("GROUP_SIZE", weight.group_size),))
        kernel.bind(0, panel_map(x, shape.num_tokens // CLUSTER).address)
        kernel.launch(
            (CLUSTER * workers, chunks, 1),
            THREADS,
            *(None, weight.packed, bias, None if has_residual else out, out if has_residual else None),
            *(partials, take_arrivals(device, chunks * -(-num_rows // TILE_ROWS))),
            *(np.int32(num_tokens), np.int32(num_rows), np.int32(num_columns), np.int32(gated)),
            shared_bytes=shape.shared_bytes(weight.group_size),
            cluster=CLUSTER,
        )
