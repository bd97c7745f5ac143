"""Launches token_ids.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 256


def gather_ids(device: Device, ids: cupy.ndarray, latest: cupy.ndarray) -> cupy.ndarray:
    """See `Kernels.gather_ids`."""
    _check(ids=ids, latest=latest)
    out = device.empty(ids.shape, np.int32)
    device.kernel("token_ids", "gather_ids").launch(_grid(ids), BLOCK, ids, latest, np.int32(len(ids)), out)
    return out


def scatter_ids(device: Device, ids: cupy.ndarray, indices: cupy.ndarray, latest: cupy.ndarray) -> None:
    """See `Kernels.scatter_ids`."""
    _check(ids=ids, indices=indices, latest=latest)
    assert ids.shape == indices.shape, f"{len(ids)} ids and {len(indices)} indices"
    device.kernel("token_ids", "scatter_ids").launch(_grid(ids), BLOCK, ids, indices, np.int32(len(ids)), latest)


def _grid(ids: cupy.ndarray) -> tuple[int, int, int]:
    return (-(-len(ids) // BLOCK), 1, 1)


def _check(**arrays: cupy.ndarray) -> None:
    for name, array in arrays.items():
        assert array.dtype == np.int32, f"{name} are {array.dtype}, expected int32"
        assert array.ndim == 1, f"{name} have {array.ndim} axes, expected one"
