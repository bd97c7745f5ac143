"""Memory for what a step computes: one run of device memory, handed out front to back and taken back in scopes.

Why not CuPy's pool: a captured graph keeps using the addresses it was captured with, and a pool would give them to
others. Here every pass over the same shapes gets the same addresses, all graphs share one arena (they run one after
another on one stream), and its peak is known before the KV cache takes what is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from nibble.kernels.cuda.errors import OutOfMemoryError

MAX_KNOWN_ARRAYS = 1 << 14
ALIGNMENT = 256  # bytes; cudaMalloc's, and more than any vector access needs


class Arena:
    """A stack of device arrays."""

    def __init__(self, num_bytes: int) -> None:
        self._memory: Any = None  # cupy.cuda.MemoryPointer
        self._used = 0
        # By start, shape and dtype: steps repeat themselves, and to make an array takes longer than to find it.
        self._arrays: dict[tuple[int, tuple[int, ...], npt.DTypeLike], cupy.ndarray] = {}
        self.resize(num_bytes)

    def resize(self, num_bytes: int) -> None:
        """Take other memory, at another address. Nothing may be in use, nor any graph that was captured with it."""
        assert self._used == 0, "the workspace is in use"
        self._arrays.clear()
        self._memory = None
        self.num_bytes = num_bytes
        self.peak_bytes = 0  # the most that was in use since
        try:
            # Not from CuPy's pool, which would keep what is given back.
            self._memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(num_bytes), 0)
        except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError) as error:
            raise OutOfMemoryError(f"a workspace of {num_bytes} bytes: {error}") from error

    @property
    def free_bytes(self) -> int:
        return max(self.num_bytes - self._used, 0)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> cupy.ndarray:
        """An uninitialised array, valid until the scope that it was made in ends. Raises OutOfMemoryError."""
        key = (self._used, shape, dtype)
        array = self._arrays.get(key)
        if array is None:
            if len(self._arrays) >= MAX_KNOWN_ARRAYS:
                self._arrays.clear()
            array = self._arrays[key] = self._make(shape, np.dtype(dtype))
        self._used += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        self.peak_bytes = max(self.peak_bytes, self._used)
        return array

    def _make(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> cupy.ndarray:
        end = self._used + math.prod(shape) * dtype.itemsize
        if end > self.num_bytes:
            raise OutOfMemoryError(f"the workspace has {self.num_bytes} bytes, this step needs at least {end}")
        return cupy.ndarray(shape, dtype, self._memory + self._used)

    def poison(self, max_bytes: int | None = None) -> None:
        """Fill (the first max_bytes of) the free part with 0xFF, which is NaN as a float and -1 as an id: for tests."""
        num_bytes = self.free_bytes if max_bytes is None else min(self.free_bytes, max_bytes)
        (self._memory + self._used).memset_async(0xFF, num_bytes, cupy.cuda.get_current_stream())

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Takes back what was made within. Kernels in flight may still use it: later ones come after them."""
        mark = self._used
        try:
            yield
        finally:
            self._used = mark
