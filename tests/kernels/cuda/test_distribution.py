"""Distributions of each sampling parameter and of several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import distribution
import pytest

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", distribution.SETTINGS)
def test_draws_follow_the_distribution(kernels: CUDAKernels, name: str) -> None:
    distribution.check(kernels, distribution.SETTINGS[name])
