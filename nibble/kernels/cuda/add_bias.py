"""Launches add_bias.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

THREADS = 256
BLOCKS_PER_MULTIPROCESSOR = 8


def add_bias(device: Device, y: cupy.ndarray, bias: cupy.ndarray) -> None:
    """y (T, N), fp16 or float32, += bias float32 (N,), in place."""
    name = "add_bias_half" if y.dtype == np.float16 else "add_bias_float"
    blocks = min(-(-y.size // THREADS), BLOCKS_PER_MULTIPROCESSOR * device.num_multiprocessors)
    kernel = device.kernel("add_bias", name)
    kernel.launch((blocks, 1, 1), THREADS, y, bias, np.int64(y.size), np.int32(y.shape[1]))
