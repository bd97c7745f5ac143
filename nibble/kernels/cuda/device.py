"""The GPU as the launchers see it: its size, its stream, its loaded kernels, its workspace."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cupy
import numpy.typing as npt

from nibble.kernels.cuda.arena import Arena
from nibble.kernels.cuda.compile import Defines, KernelResources, compile_cubin
from nibble.kernels.cuda.errors import CUDABackendError
from nibble.kernels.cuda.launch import Kernel, get_function, load_module

OLDEST = (8, 0)


class Device:
    """One GPU; the launchers (`<op>.py`) get it as their first argument.

    Makes itself and its stream the current ones of the calling thread. Not the default stream, which cannot be
    captured; all work of the process goes to it, so that everything happens in program order.
    """

    def __init__(self, index: int, workspace_bytes: int, kernel_cache: Path | None = None) -> None:
        cupy.cuda.Device(index).use()
        self.stream = _stream(index)
        self.stream.use()
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        capability = (properties["major"], properties["minor"])
        if capability < OLDEST:
            raise CUDABackendError(f"compute capability {capability[0]}.{capability[1]}, the least is 8.0")
        self.name = properties["name"].decode()
        self.num_multiprocessors = int(properties["multiProcessorCount"])
        self.max_shared_bytes = int(properties["sharedMemPerBlockOptin"])
        self.architecture = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
        self._overlaps = capability >= (9, 0)  # programmatic dependent launch
        self.arena = Arena(workspace_bytes)
        self.kernel_cache = kernel_cache
        self._kernels: dict[tuple[str, Defines, str], Kernel] = {}
        self.resources: dict[tuple[str, Defines, str], KernelResources] = {}

    def kernel(self, stem: str, name: str, defines: Defines = ()) -> Kernel:
        """The function `name` of `<stem>.cu`, compiled at its first use."""
        key = (stem, defines, name)
        if key not in self._kernels:
            self.load(stem, defines)
        return self._kernels[key]

    def load(self, stem: str, defines: Defines) -> None:
        """Compile `<stem>.cu`, or take it from the cache, and load all of its functions."""
        cubin = compile_cubin(stem, defines, self.architecture, self.kernel_cache)
        module = load_module(cubin.code)
        for name, resources in cubin.resources.items():
            self._kernels[stem, defines, name] = Kernel(get_function(module, name), name, self._overlaps)
            self.resources[stem, defines, name] = resources

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> cupy.ndarray:
        """An uninitialised array of the workspace; see `Arena.empty`."""
        return self.arena.empty(shape, dtype)


@cache
def _stream(index: int) -> cupy.cuda.Stream:
    """One per GPU: a second `Device` must not leave the first with a stream that is no longer current."""
    return cupy.cuda.Stream(non_blocking=True)
