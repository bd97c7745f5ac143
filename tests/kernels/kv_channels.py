"""Scales and zeros of channels for the tests of int8-channel blocks."""

from __future__ import annotations

import numpy as np

from nibble.kernels.interface import Kernels, KVChannels
from nibble.kernels.layout import KVDtype, KVLayout


def channels_of(kernels: Kernels, layout: KVLayout) -> KVChannels | None:
    """The same for the same layout, for values of magnitude about 1; some reach beyond. None for other blocks."""
    if layout.dtype is not KVDtype.INT8_CHANNEL:
        return None
    return KVChannels(kernels.to_device(channel_parameters(layout)), kernels.zeros((1,), np.int64))


def channel_parameters(layout: KVLayout) -> np.ndarray:
    rng = np.random.default_rng(layout.head_dim)
    parameters = np.empty(layout.channels_shape, np.float32)
    parameters[:, :, 0] = rng.uniform(0.004, 0.024, parameters[:, :, 0].shape)
    parameters[:, :, 1] = rng.uniform(-0.9, 0.9, parameters[:, :, 1].shape)
    return parameters
