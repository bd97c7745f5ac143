"""Launches int4_mma.cu (sm_90a)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.launch import Kernel
from nibble.kernels.cuda.tensor_map import panels_map
from nibble.kernels.interface import Int4Weight
from nibble.kernels.layout import GROUP_SIZES, TILE_COLUMNS, TILE_ROWS, int4_num_bytes

VARIANTS: tuple[Defines, ...] = tuple((("GROUP_SIZE", size),) for size in GROUP_SIZES)

MAX_TOKENS = 16
PANEL_COLUMNS = 64  # of x; it has a whole number of them
CLUSTER = 2  # thread blocks
THREADS = 20 * 32
_STAGES = 8
_UNIT_TILES = 2
_MIN_SHARED_BYTES = 115 * 1024  # more than half of a multiprocessor's: one block to each


@dataclass(frozen=True)
class _Shape:
    """A kernel of int4_mma.cu, which has the same formula."""

    num_tokens: int
    group_size: int

    @property
    def shared_bytes(self) -> int:
        tile_bytes = int4_num_bytes(TILE_ROWS, TILE_COLUMNS, self.group_size)
        stage_bytes = _UNIT_TILES * (tile_bytes + self.num_tokens * TILE_COLUMNS * 2) + 2 * 8
        other_bytes = self.num_tokens * 1024 + 2 * 8
        return max(_STAGES * stage_bytes + other_bytes, _MIN_SHARED_BYTES)

    def kernel(self, device: Device) -> Kernel:
        return device.kernel("int4_mma", f"int4_mma_{self.num_tokens}", (("GROUP_SIZE", self.group_size),))


def int4_mma(
    device: Device,
    x: cupy.ndarray,
    weight: Int4Weight,
    bias: cupy.ndarray | None,
    out: cupy.ndarray,
    gated: bool,
) -> None:
    """`int4_linear` with the arguments checked; out is fp16, or the float32 residual."""
    num_tokens, num_rows, num_columns = x.shape[0], weight.out_features, weight.in_features
    shape = _Shape(8 if num_tokens <= 8 else MAX_TOKENS, weight.group_size)
    clusters = min(_max_clusters(device, shape), -(-num_rows // TILE_ROWS))
    has_residual = out.dtype == np.float32
    kernel = shape.kernel(device)
    kernel.bind(0, panels_map(x, shape.num_tokens, 4).address)
    kernel.launch(
        (CLUSTER * clusters, -(-num_tokens // shape.num_tokens), 1),
        THREADS,
        *(None, weight.packed, bias, None if has_residual else out, out if has_residual else None),
        *(np.int32(num_tokens), np.int32(num_rows), np.int32(num_columns), np.int32(gated)),
        shared_bytes=shape.shared_bytes,
        cluster=CLUSTER,
    )


@cache
def _max_clusters(device: Device, shape: _Shape) -> int:
    return shape.kernel(device).max_clusters(THREADS, shared_bytes=shape.shared_bytes, cluster=CLUSTER)
