"""Large arrays to the device: files in the page cache at the speed of the bus.

CUDA copies pageable memory through one small buffer of its own, on one core. Here a few threads fill a ring of
page-locked buffers (for a memory map that is where its pages are read) while earlier ones are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 8 << 20
NUM_BUFFERS = 8  # 64 MiB of page-locked memory
NUM_THREADS = 4
MIN_BYTES = 1 << 20  # below, one plain copy is as fast


class Uploader:
    """The ring of buffers and its threads; made at the first large array."""

    def __init__(self) -> None:
        self._buffers: deque[npt.NDArray[np.uint8]] = deque()
        self._events: dict[int, cupy.cuda.Event] = {}
        self._threads: ThreadPoolExecutor | None = None

    def upload(self, source: npt.NDArray[np.uint8], address: int) -> None:
        """Copy bytes (n,) to the device address. Has read all of the source when it returns."""
        if not self._buffers:
            self._make_buffers()
        assert self._threads is not None
        stream = cupy.cuda.get_current_stream()
        kind = cupy.cuda.runtime.memcpyHostToDevice
        for start, size, buffer, filled in self._fill(source):
            filled.result()
            cupy.cuda.runtime.memcpyAsync(address + start, buffer.ctypes.data, size, kind, stream.ptr)
            self._events[buffer.ctypes.data].record(stream)

    def _fill(self, source: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int, npt.NDArray[np.uint8], Future[None]]]:
        """(start, bytes, buffer, when it is full) of each chunk, in order, up to a ring ahead."""
        assert self._threads is not None
        pending: deque[tuple[int, int, npt.NDArray[np.uint8], Future[None]]] = deque()
        for start in range(0, len(source), CHUNK_BYTES):
            if len(pending) == NUM_BUFFERS // 2:  # the other half is on its way to the device
                yield pending.popleft()
            chunk = source[start : start + CHUNK_BYTES]
            buffer = self._buffers[0]
            self._buffers.rotate(-1)
            self._events[buffer.ctypes.data].synchronize()
            filled = self._threads.submit(np.copyto, buffer[: len(chunk)], chunk)
            pending.append((start, len(chunk), buffer, filled))
        yield from pending

    def _make_buffers(self) -> None:
        for _ in range(NUM_BUFFERS):
            buffer = cupyx.empty_pinned((CHUNK_BYTES,), np.uint8)
            self._buffers.append(buffer)
            self._events[buffer.ctypes.data] = cupy.cuda.Event(disable_timing=True)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "nibble-upload")

    def close(self) -> None:
        """Give the buffers and threads back (a later upload makes new ones)."""
        for event in self._events.values():
            event.synchronize()
        self._buffers.clear()
        self._events.clear()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
