"""The CUDA backend for tests marked `gpu`; they are skipped where CuPy or a GPU is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels
    from nibble.kernels.cuda.device import Device

WORKSPACE_BYTES = 2 << 30


@pytest.fixture(scope="session")
def kernels() -> CUDAKernels:
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    from nibble.kernels.cuda.backend import CUDAKernels

    return CUDAKernels(workspace_bytes=WORKSPACE_BYTES)


@pytest.fixture
def device(kernels: CUDAKernels) -> Device:
    return kernels.device


@pytest.fixture
def poison(device: Device) -> Callable[[], None]:
    """Fills the free workspace with 0xFF (NaN, -1): an element that an op does not write shows."""
    return device.arena.poison


@pytest.fixture(autouse=True)
def _poisoned_temporaries(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that uses the backend starts on poisoned memory, and gives back what its ops returned."""
    if "kernels" not in request.fixturenames:
        yield
        return
    kernels: CUDAKernels = request.getfixturevalue("kernels")
    cupy = pytest.importorskip("cupy")
    with kernels.temporaries():
        kernels.device.arena.poison(64 << 20)
        yield
        assert cupy.cuda.get_current_stream() == kernels.device.stream, "the backend's stream is no longer current"
        kernels.device.stream.synchronize()  # an error of a kernel belongs to its test


@pytest.fixture
def replay(kernels: CUDAKernels) -> Callable[[Callable[[], None]], None]:
    """Runs a step as a graph, twice: counters and semaphores must be left as they were found."""

    def run(step: Callable[[], None]) -> None:
        graph = kernels.capture(step)
        graph()
        graph()
        kernels.device.stream.synchronize()

    return run


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
