"""One CPU backend for all kernel tests: its threads and compiled code are shared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from nibble.kernels.cpu.backend import CPUKernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[CPUKernels]:
    from nibble.kernels.cpu.backend import CPUKernels  # numba, which a machine for GPU tests may lack

    backend = CPUKernels(num_threads=2)
    yield backend
    backend.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
