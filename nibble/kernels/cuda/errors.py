"""Errors of the CUDA backend.

CUDABackendError
    CompileError       a .cu file does not compile: a bug, or an NVRTC that is too old
    DriverError        a driver call failed; the message has CUDA's name for it
    OutOfMemoryError   the plan does not fit on the device; also a MemoryError
"""

from __future__ import annotations


class CUDABackendError(RuntimeError):
    """Base of all."""


class CompileError(CUDABackendError):
    """NVRTC refused a kernel; the message is its log."""


class DriverError(CUDABackendError):
    """A call of the CUDA driver failed."""


class OutOfMemoryError(CUDABackendError, MemoryError):
    """What was asked for does not fit into the device's memory."""
