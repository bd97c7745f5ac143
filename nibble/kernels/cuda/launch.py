"""Loaded kernels and how they are launched: the driver's cuLaunchKernelEx, so that the next kernel may start early.

Every launch carries the programmatic-stream-serialization attribute (sm_90): a kernel's blocks start while the kernel
before it still runs, and wait in `grid_wait()` (`common.cuh`) before they touch its results. In between they fetch
weights. On older devices the attribute is left out. ctypes rather than cuda.bindings here: a prefill step launches
hundreds of kernels one by one, and the time to build Python objects for each would be longer than the kernels.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import cupy
import numpy as np
from cuda.bindings import driver

from nibble.kernels.cuda.errors import DriverError

MAX_STATIC_SHARED_BYTES = 48 * 1024  # more must be asked for, per kernel

_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, a value of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def _launch_function() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return function


def check(error: Any) -> None:
    """Raise DriverError unless a driver call of cuda.bindings succeeded."""
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"CUDA driver: {error.name}")


class Kernel:
    """One `extern "C"` function on the device."""

    def __init__(self, function: Any, name: str, overlaps: bool) -> None:
        """overlaps: the device has programmatic dependent launch (sm_90)."""
        self.name = name
        self._function = function
        self._handle = int(function)
        self._overlaps = overlaps
        self._shared_limit = MAX_STATIC_SHARED_BYTES

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        *arguments: Any,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream. Does not wait, allocates nothing.

        arguments: CuPy arrays (C-contiguous), None (a null pointer), NumPy scalars of the parameter's exact type.
        shared_bytes: dynamic shared memory. cluster: blocks along x per cluster (sm_90).
        """
        self._allow_shared(shared_bytes)
        config = _Config(grid, (block, 1, 1), shared_bytes, cupy.cuda.get_current_stream().ptr)
        attributes = (_Attribute * 2)()
        count = 0
        if self._overlaps:
            attributes[0].id, attributes[0].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
            count = 1
        if cluster > 1:
            attributes[count].id = _CLUSTER_DIMENSION
            attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        config.attributes, config.num_attributes = attributes, count
        values = [_as_ctypes(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        result = _launch_function()(ctypes.byref(config), self._handle, pointers, None)
        if result:
            raise DriverError(f"launching {self.name}: {driver.CUresult(result).name}")

    def attribute(self, which: Any) -> int:
        """A CUfunction_attribute of the loaded code, e.g. its registers."""
        error, value = driver.cuFuncGetAttribute(which, self._function)
        check(error)
        return int(value)

    def _allow_shared(self, shared_bytes: int) -> None:
        if shared_bytes <= self._shared_limit:
            return
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes)[0])
        self._shared_limit = shared_bytes


_SCALARS: dict[type, Any] = {
    np.int32: ctypes.c_int32,
    np.uint32: ctypes.c_uint32,
    np.int64: ctypes.c_int64,
    np.uint64: ctypes.c_uint64,
    np.float32: ctypes.c_float,
}


def _as_ctypes(argument: Any) -> Any:
    if isinstance(argument, cupy.ndarray):
        assert argument.flags.c_contiguous, "a kernel's arrays must be C-contiguous"
        return ctypes.c_void_p(argument.data.ptr)
    if argument is None:
        return ctypes.c_void_p(0)
    scalar = _SCALARS.get(type(argument))
    assert scalar is not None, f"{type(argument).__name__} is not a kernel argument; wrap numbers: np.int32(...)"
    return scalar(argument.item())


def load_module(code: bytes) -> Any:
    """A cubin in the current context; it stays loaded until the process ends."""
    error, module = driver.cuModuleLoadData(code)
    check(error)
    return module


def get_function(module: Any, name: str) -> Any:
    error, function = driver.cuModuleGetFunction(module, name.encode())
    check(error)
    return function
