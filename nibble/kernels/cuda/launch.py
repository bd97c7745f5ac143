"""Loaded kernels and how they are launched: the driver's cuLaunchKernelEx, so that the next kernel may start early.

Every launch carries the programmatic-stream-serialization attribute (sm_90): a kernel's blocks start while the kernel
before it still runs, and wait in `grid_wait()` (`common.cuh`) before they touch its results. In between they fetch
weights. On older devices the attribute is left out. ctypes rather than cuda.bindings here: a prefill step launches
hundreds of kernels one by one, and the time to build Python objects for each would be longer than the kernels.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import cupy
import numpy as np
from cuda.bindings import driver

from nibble.kernels.cuda.errors import DriverError

MAX_ARGUMENTS = 32

_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, a value of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16))


# CUlaunchConfig: grid (3), block (3), dynamic shared bytes, padding, stream, attributes, their number, padding
_CONFIG = struct.Struct("<7I4xQQI4x")


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launch_function() -> Any:
    function = _driver().cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return function


def check(error: Any) -> None:
    """Raise DriverError unless a driver call of cuda.bindings succeeded."""
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"CUDA driver: {error.name}")


class Kernel:
    """One `extern "C"` function on the device. Not thread-safe: one buffer holds the arguments of a launch."""

    def __init__(self, function: Any, name: str, overlaps: bool) -> None:
        """overlaps: the device has programmatic dependent launch (sm_90)."""
        self.name = name
        self._function = function
        self._handle = int(function)
        self._overlaps = overlaps
        self._shared_limit = 0  # beyond 48 KiB, static ones included, they must be asked for: always, then
        self._attributes = (_Attribute * 2)()
        self._attributes[0].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        self._attributes[0].value[0] = 1
        self._attributes[1].id = _CLUSTER_DIMENSION
        self._attributes_address = ctypes.addressof(self._attributes)
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._slots = (ctypes.c_uint64 * MAX_ARGUMENTS)()  # the driver copies them before a launch returns
        address = ctypes.addressof(self._slots)
        self._pointers = (ctypes.c_void_p * MAX_ARGUMENTS)(*(address + 8 * i for i in range(MAX_ARGUMENTS)))
        self._types: tuple[type, ...] | None = None  # of the last launch's arguments, and how they are packed
        self._format = struct.Struct("")
        self._launch = _launch_function()

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Any,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream. Does not wait, allocates nothing. An empty grid launches nothing.

        arguments: CuPy arrays (C-contiguous), None (a null pointer), NumPy scalars of the parameter's exact type.
        shared_bytes: dynamic shared memory. cluster: blocks along x per cluster (sm_90).
        """
        if 0 in grid:
            return
        if shared_bytes > self._shared_limit:
            self._allow_shared(shared_bytes)
        types = tuple(map(type, arguments))
        if types != self._types:
            self._types, self._format = types, _argument_format(types)
        self._format.pack_into(self._slots, 0, *map(_value, arguments))
        self._configure(grid, block, shared_bytes, cluster)
        result = self._launch(self._config, self._handle, self._pointers, None)
        if result:
            raise DriverError(f"launching {self.name}: {driver.CUresult(result).name}")

    def _configure(self, grid: tuple[int, int, int], block: int, shared_bytes: int, cluster: int) -> None:
        num_attributes = 1 if self._overlaps else 0
        if cluster > 1:
            assert self._overlaps, "clusters need sm_90"
            self._attributes[1].value[0:3] = [cluster, 1, 1]
            num_attributes = 2
        stream = cupy.cuda.get_current_stream().ptr
        attributes = self._attributes_address
        _CONFIG.pack_into(self._config, 0, *grid, block, 1, 1, shared_bytes, stream, attributes, num_attributes)

    def max_clusters(self, block: int, *, shared_bytes: int, cluster: int) -> int:
        """How many clusters of such a launch the device holds at once; not always its size by theirs, because the
        blocks of one are placed on neighbouring multiprocessors."""
        if shared_bytes > self._shared_limit:
            self._allow_shared(shared_bytes)
        self._configure((cluster, 1, 1), block, shared_bytes, cluster)
        count = ctypes.c_int()
        result = _driver().cuOccupancyMaxActiveClusters(
            ctypes.byref(count), ctypes.c_void_p(self._handle), self._config
        )
        if result:
            raise DriverError(f"clusters of {self.name}: {driver.CUresult(result).name}")
        return count.value

    def bind(self, index: int, address: int) -> None:
        """From now on argument `index` is read from the host's memory there, and None is passed to `launch` for it.

        For parameters larger than a slot (`tensor_map.py`). The memory must outlive the launches.
        """
        self._pointers[index] = address

    def attribute(self, which: Any) -> int:
        """A CUfunction_attribute of the loaded code, e.g. its registers."""
        error, value = driver.cuFuncGetAttribute(which, self._function)
        check(error)
        return int(value)

    def _allow_shared(self, shared_bytes: int) -> None:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes)[0])
        self._shared_limit = shared_bytes


# struct formats of one argument each, in a slot of 8 bytes
_FORMATS = {
    cupy.ndarray: "Q",
    type(None): "Q",
    np.int32: "i4x",
    np.uint32: "I4x",
    np.int64: "q",
    np.uint64: "Q",
    np.float32: "f4x",
}


@cache
def _argument_format(types: tuple[type, ...]) -> struct.Struct:
    unknown = [kind.__name__ for kind in types if kind not in _FORMATS]
    assert not unknown, f"{unknown} are no kernel arguments; wrap numbers: np.int32(...)"
    assert len(types) <= MAX_ARGUMENTS, f"a kernel has {len(types)} parameters, the limit is {MAX_ARGUMENTS}"
    return struct.Struct("<" + "".join(_FORMATS[kind] for kind in types))


def _value(argument: Any) -> Any:
    if type(argument) is cupy.ndarray:
        assert argument._c_contiguous, "a kernel's arrays must be C-contiguous"  # .flags takes six times as long
        return argument.data.ptr
    return 0 if argument is None else argument


def load_module(code: bytes) -> Any:
    """A cubin in the current context; it stays loaded until the process ends."""
    error, module = driver.cuModuleLoadData(code)
    check(error)
    return module


def get_function(module: Any, name: str) -> Any:
    """Loaded to the device now: lazily, a capture or a request would come upon it."""
    error, function = driver.cuModuleGetFunction(module, name.encode())
    check(error)
    check(driver.cuFuncLoad(function)[0])
    return function
