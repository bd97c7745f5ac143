"""The CPU backend as if it were a device with its own clock and memory: it refuses what such a device could not do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Array, HostCopy

WORKSPACE_BYTES = 1 << 20


class LateKernels(CPUKernels):
    """Host buffers must stay unchanged until a later copy from the device was waited for; nothing is read before."""

    def __init__(self, total_bytes: int = 1 << 30, num_threads: int | None = None) -> None:
        super().__init__(num_threads)
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.num_captured = 0
        self.num_replayed = 0
        self._uploads: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []  # under way, and what they must stay
        self._is_capturing = False

    @property
    def is_asynchronous(self) -> bool:
        return True

    def memory_info(self) -> tuple[int, int]:
        return self.total_bytes - self.used_bytes, self.total_bytes

    def fit_workspace(self, step: Callable[[], None]) -> int:
        step()
        self.used_bytes += WORKSPACE_BYTES
        return WORKSPACE_BYTES

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        assert not self._is_capturing, "a captured step must not allocate"
        array = np.zeros(shape, dtype)
        if self.used_bytes + array.nbytes > self.total_bytes:
            raise MemoryError(f"{array.nbytes} bytes")
        self.used_bytes += array.nbytes
        weakref.finalize(array, self._free, array.nbytes)
        return array

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        raise AssertionError("the host would wait for the device")

    def copy_to_device(self, source: npt.NDArray[Any], target: Array) -> None:
        assert not self._is_capturing, "a captured step must not copy"
        super().copy_to_device(source, target)
        self._uploads.append((source, source.copy()))

    def copy_blocks(
        self, kv_cache: Array, swapped: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int32], *, to_host: bool
    ) -> None:
        assert not self._is_capturing, "a captured step must not copy"
        for column in pairs.T:
            assert len(set(column)) == len(column), "a block is named twice"
        super().copy_blocks(kv_cache, swapped, pairs, to_host=to_host)
        self._uploads.append((pairs, pairs.copy()))

    def start_to_host(self, array: Array) -> HostCopy:
        assert not self._is_capturing, "a captured step must not copy"
        return _LateCopy(self, array.copy(), len(self._uploads))

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self._is_capturing = True
        step()
        self._is_capturing = False
        self.num_captured += 1

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay

    def arrived(self, num_uploads: int) -> None:
        for source, content in self._uploads[:num_uploads]:
            assert (source == content).all(), "a host buffer was changed while it was copied"
        self._uploads[:num_uploads] = [(np.empty(0), np.empty(0))] * num_uploads

    def _free(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


class _LateCopy:
    def __init__(self, kernels: LateKernels, array: npt.NDArray[Any], num_uploads: int) -> None:
        self._kernels = kernels
        self._array = array
        self._num_uploads = num_uploads

    def wait(self) -> npt.NDArray[Any]:
        self._kernels.arrived(self._num_uploads)
        return self._array
