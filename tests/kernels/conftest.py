"""One CPU backend for all kernel tests: its threads and compiled code are shared."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nibble.kernels.cpu.backend import CPUKernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CPUKernels]:
    backend = CPUKernels(num_threads=2)
    yield backend
    backend.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
