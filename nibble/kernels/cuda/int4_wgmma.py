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

ARCHITECTURE = "sm_90a"
BLOCKS_PER_WORKER = 2
# One block for each of an H100's 132 multiprocessors. A constant and not the device's number, so that the order of
# additions is the same on all.
MAX_WORKERS = 66
UNIT_ROWS = 4 * TILE_ROWS  # x TILE_COLUMNS: what workers share out
SHARED_BYTES = 228 * 1024  # of a multiprocessor; a block can have 1 KiB less than its part


@dataclass(frozen=True)
class _Shape:
    """A kernel of int4_wgmma.cu, whose end has the same numbers."""

    num_tokens: int
    blocks: int  # that a multiprocessor has room for

    @property
    def threads(self) -> int:
        return 4 * 128 + (128 if self.blocks == 1 else 32)

    @property
    def cluster(self) -> int:
        """Blocks that share x."""
        return BLOCKS_PER_WORKER if self.num_tokens > 16 else 1

    def shared_bytes(self, group_size: int) -> int:
        weight_bytes = 2 * int4_num_bytes(TILE_ROWS, TILE_COLUMNS, group_size)
        stage_bytes = self.num_tokens * TILE_COLUMNS * 2 + weight_bytes + 2 * 8
        other_bytes = self.num_tokens * 128 * 4 + 8
        return (SHARED_BYTES // self.blocks - 1024 - other_bytes) // stage_bytes * stage_bytes + other_bytes


_SHAPES = (_Shape(8, 2), _Shape(16, 2), _Shape(32, 1), _Shape(64, 1), _Shape(128, 1))


def num_workers(num_rows: int, num_columns: int) -> int:
    """Among how many the matrix is cut: what the order of additions depends on."""
    return min(MAX_WORKERS, -(-num_rows // UNIT_ROWS) * -(-num_columns // TILE_COLUMNS))


def int4_wgmma(
    device: Device, x: cupy.ndarray, weight: Int4Weight, bias: cupy.ndarray | None, out: cupy.ndarray, gated: bool
) -> None:
    """`int4_linear` with the arguments checked; out is fp16, or the float32 residual."""
    num_tokens, num_rows, num_columns = x.shape[0], weight.out_features, weight.in_features
    shape = next((shape for shape in _SHAPES if num_tokens <= shape.num_tokens), _SHAPES[-1])
    chunks, workers = -(-num_tokens // shape.num_tokens), num_workers(num_rows, num_columns)
    has_residual = out.dtype == np.float32
    with device.arena.scope():
        # for each worker the ends of a run that share a row group with others: at most two
        partials = device.empty((chunks * workers * 2 * UNIT_ROWS * shape.num_tokens,), np.float32)
        kernel = device.kernel("int4_wgmma", f"int4_wgmma_{shape.num_tokens}", (("GROUP_SIZE", weight.group_size),))
        kernel.bind(0, panel_map(x, shape.num_tokens // shape.cluster).address)
        kernel.launch(
            (BLOCKS_PER_WORKER * workers, chunks, 1),
            shape.threads,
            *(None, weight.packed, bias, None if has_residual else out, out if has_residual else None),
            *(partials, take_arrivals(device, chunks * -(-num_rows // TILE_ROWS))),
            *(np.int32(num_tokens), np.int32(num_rows), np.int32(num_columns), np.int32(workers), np.int32(gated)),
            shared_bytes=shape.shared_bytes(weight.group_size),
            cluster=shape.cluster,
        )
