"""Launches int4_wgmma.cu (sm_90a)."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.tensor_map import panel_map
from nibble.kernels.interface import Int4Weight
from nibble.kernels.layout import GROUP_SIZES, TILE_COLUMNS, TILE_ROWS, int4_num_bytes

VARIANTS: tuple[Defines, ...] = tuple((("GROUP_SIZE", size),) for size in GROUP_SIZES)

CLUSTER = 2  # thread blocks of a worker
THREADS = 5 * 128
MAX_CHUNKS = 4  # of tokens, in a launch: what the exchange has room for
_BLOCK_ROWS = 2 * TILE_ROWS
_TEAMS = 2
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
        meeting_bytes = 2 * self.num_tokens * (_BLOCK_ROWS + 4) * 4
        stages = (_SHARED_BYTES - meeting_bytes) // stage_bytes // _TEAMS * _TEAMS
        return stages * stage_bytes + meeting_bytes


_SHAPES = (_Shape(32), _Shape(64))


def int4_wgmma(
    device: Device, x: cupy.ndarray, weight: Int4Weight, bias: cupy.ndarray | None, out: cupy.ndarray, gated: bool
) -> None:
    """`int4_linear` with the arguments checked; out is fp16, or the float32 residual."""
    most = MAX_CHUNKS * _SHAPES[-1].num_tokens
    for start in range(0, x.shape[0], most):
        part = slice(start, start + most)
        _launch(device, x[part], weight, bias, out[part], gated)


def _launch(
    device: Device, x: cupy.ndarray, weight: Int4Weight, bias: cupy.ndarray | None, out: cupy.ndarray, gated: bool
) -> None:
    num_tokens, num_rows, num_columns = x.shape[0], weight.out_features, weight.in_features
    shape = next((shape for shape in _SHAPES if num_tokens <= shape.num_tokens), _SHAPES[-1])
    workers = min(_MAX_RUNS, -(-num_rows // _GROUP_ROWS) * _PAIRS)
    has_residual = out.dtype == np.float32
    kernel = device.kernel("int4_wgmma", f"int4_wgmma_{shape.num_tokens}", (("GROUP_SIZE", weight.group_size),))
    kernel.bind(0, panel_map(x, shape.num_tokens // CLUSTER).address)
    kernel.launch(
        (CLUSTER * workers, -(-num_tokens // shape.num_tokens), 1),
        THREADS,
        *(None, weight.packed, bias, None if has_residual else out, out if has_residual else None, _exchange(device)),
        *(np.int32(num_tokens), np.int32(num_rows), np.int32(num_columns), np.int32(gated)),
        shared_bytes=shape.shared_bytes(weight.group_size),
        cluster=CLUSTER,
    )


_exchanges: WeakKeyDictionary[Device, dict[int, cupy.ndarray]] = WeakKeyDictionary()


def _exchange(device: Device) -> cupy.ndarray:
    """Where workers leave each other sums (see exchange.cuh): all bits set where nobody has. One for each stream."""
    stream = cupy.cuda.get_current_stream()
    of_device = _exchanges.setdefault(device, {})
    if stream.ptr not in of_device:
        # A worker shares at most two row groups with others: where its run begins and where it ends
        num_bytes = MAX_CHUNKS * _MAX_RUNS * 2 * _GROUP_ROWS * _SHAPES[-1].num_tokens * 4
        memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(num_bytes), 0)  # not from CuPy's pool: for good
        memory.memset_async(0xFF, num_bytes, stream)
        of_device[stream.ptr] = cupy.ndarray((num_bytes // 4,), np.float32, memory)
    return of_device[stream.ptr]
