"""Counters with which thread blocks find out who is the last of several: zero whenever no kernel uses them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import cupy
import numpy as np

from nibble.kernels.cuda.device import Device

NUM_COUNTERS = 1 << 18


class _Ring:
    """Each launch takes the next counters of a ring, so that launches on two streams do not meet."""

    def __init__(self) -> None:
        self._counters = cupy.zeros(NUM_COUNTERS, np.uint32)
        cupy.cuda.get_current_stream().synchronize()  # the first launch may be on another stream
        self._next = 0

    def take(self, count: int) -> cupy.ndarray:
        assert count <= NUM_COUNTERS, f"{count} counters, there are {NUM_COUNTERS}"
        start = self._next if self._next + count <= NUM_COUNTERS else 0
        self._next = start + count
        return self._counters[start : start + count]


_rings: WeakKeyDictionary[Device, _Ring] = WeakKeyDictionary()


def take_arrivals(device: Device, count: int) -> cupy.ndarray:
    """uint32 (count,), zero at the launch; the kernel leaves it so. The first use of a device allocates them."""
    if device not in _rings:
        _rings[device] = _Ring()
    return _rings[device].take(count)
