"""How fast this device reads its memory: launches read_bandwidth.cu over more than its caches hold."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

MAX_BYTES = 1 << 30
MIN_BYTES = 256 << 20  # five times the L2 of an H100
RUN_BYTES = 8 * 512 * 16  # what a thread block reads at a time
BLOCK = 512
BLOCKS_PER_MULTIPROCESSOR = 4
REPEATS = 5


def read_bandwidth(device: Device) -> float:
    """Bytes per second, the best of a few runs.

    Reads the free part of the workspace, and memory of its own only where that is small.
    """
    num_bytes = min(device.arena.free_bytes, MAX_BYTES) // RUN_BYTES * RUN_BYTES
    with device.arena.scope():
        data = device.empty((num_bytes,), np.uint8) if num_bytes >= MIN_BYTES else cupy.empty(MIN_BYTES, np.uint8)
        return measure(device, data)


def measure(device: Device, data: cupy.ndarray) -> float:
    grid = (BLOCKS_PER_MULTIPROCESSOR * device.num_multiprocessors, 1, 1)
    num_vectors = np.int64(data.nbytes // 16)
    device.kernel("read_bandwidth", "fill_random").launch(grid, BLOCK, data, num_vectors)
    milliseconds = []
    for _ in range(REPEATS):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(device.stream)
        # The sink is never written to but for a chance of 1 in 2^32 per thread; any word will do.
        device.kernel("read_bandwidth", "read_bandwidth").launch(grid, BLOCK, data, num_vectors, data)
        stop.record(device.stream)
        stop.synchronize()
        milliseconds.append(cupy.cuda.get_elapsed_time(start, stop))
    return float(data.nbytes / (min(milliseconds) / 1e3))
