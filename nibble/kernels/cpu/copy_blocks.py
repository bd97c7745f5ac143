"""KV blocks of all layers into another array, or back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def copy_blocks(
    kv_cache: npt.NDArray[np.uint8], swapped: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int32], to_host: bool
) -> None:
    """See `Kernels.copy_blocks`."""
    blocks, host_blocks = pairs.T
    if to_host:
        swapped[host_blocks] = kv_cache[:, blocks].swapaxes(0, 1)
    else:
        kv_cache[:, blocks] = swapped[host_blocks].swapaxes(0, 1)
