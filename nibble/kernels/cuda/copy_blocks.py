"""Launches copy_blocks.cu."""

from __future__ import annotations

import cupy
import numpy as np
import numpy.typing as npt

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

THREADS, PIECES, PIECE_BYTES = 256, 8, 16  # as in copy_blocks.cu
MAX_PAIRS = 65535  # of a grid along z


def copy_blocks(
    device: Device,
    kv_cache: cupy.ndarray,
    swapped: npt.NDArray[np.uint8],
    pairs: npt.NDArray[np.int32],
    to_host: bool,
) -> None:
    """See `Kernels.copy_blocks`. The host's arrays are page-locked, so their addresses are the device's too."""
    num_layers, num_blocks = kv_cache.shape[:2]
    assert kv_cache.dtype == np.uint8, f"the cache is {kv_cache.dtype}, expected uint8"
    assert swapped.dtype == np.uint8, f"swapped is {swapped.dtype}, expected uint8"
    assert swapped.shape[1:] == (num_layers, *kv_cache.shape[2:]), (
        f"blocks are {swapped.shape[1:]} in the host's memory"
    )
    assert pairs.dtype == np.int32, f"pairs are {pairs.dtype}, expected int32"
    assert pairs.shape == (len(pairs), 2), f"pairs are {pairs.shape}, expected (m, 2)"
    assert swapped.flags.c_contiguous, "swapped must be C-contiguous"
    assert pairs.flags.c_contiguous, "pairs must be C-contiguous"
    assert len(pairs) <= MAX_PAIRS, f"{len(pairs)} blocks are to be copied, the limit is {MAX_PAIRS}"
    num_pieces = kv_cache.nbytes // (num_layers * num_blocks * PIECE_BYTES)
    device.kernel("copy_blocks", "copy_blocks").launch(
        (-(-num_pieces // (THREADS * PIECES)), num_layers, len(pairs)),
        THREADS,
        kv_cache,
        np.uint64(swapped.ctypes.data),
        np.uint64(pairs.ctypes.data),
        np.int32(num_blocks),
        np.int32(num_pieces),
        np.int32(to_host),
    )
