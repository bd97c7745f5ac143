"""Copies from the device that the host collects later: page-locked buffers, reused once their copy was let go."""

from __future__ import annotations

import weakref
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

MIN_BUFFER_BYTES = 4096  # sampled ids of any batch fit, so one size serves every step


class _Buffer:
    """Page-locked memory and the event after the last copy into it."""

    def __init__(self, num_bytes: int) -> None:
        self.memory: npt.NDArray[np.uint8] = cupyx.empty_pinned((num_bytes,), np.uint8)
        self.address = int(self.memory.ctypes.data)
        self.event = cupy.cuda.Event(disable_timing=True)


class DeviceCopy:
    """A copy under way (`HostCopy`)."""

    def __init__(self, buffer: _Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], num_bytes: int) -> None:
        self._buffer = buffer
        self._shape = shape
        self._dtype = dtype
        self._num_bytes = num_bytes

    def wait(self) -> npt.NDArray[Any]:
        self._buffer.event.synchronize()
        # A new array: the buffer serves another copy as soon as this object is gone.
        return self._buffer.memory[: self._num_bytes].copy().view(self._dtype).reshape(self._shape)


class HostCopies:
    """Starts copies on the current stream."""

    def __init__(self) -> None:
        self._free: dict[int, list[_Buffer]] = {}  # by size

    def start(self, array: cupy.ndarray) -> DeviceCopy:
        """Copy a C-contiguous device array as it will be when all work before this call has finished."""
        assert array.flags.c_contiguous, "only C-contiguous arrays are copied"
        num_bytes = int(array.nbytes)
        size = max(MIN_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length()) if num_bytes else MIN_BUFFER_BYTES
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else _Buffer(size)
        buffer.event.synchronize()  # a copy that was dropped may still be under way
        stream = cupy.cuda.get_current_stream()
        kind = cupy.cuda.runtime.memcpyDeviceToHost
        cupy.cuda.runtime.memcpyAsync(buffer.address, array.data.ptr, num_bytes, kind, stream.ptr)
        buffer.event.record(stream)
        copy = DeviceCopy(buffer, array.shape, array.dtype, num_bytes)
        weakref.finalize(copy, free.append, buffer)
        return copy
