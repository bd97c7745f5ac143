"""Distributions of each sampling parameter and of several at once."""

from __future__ import annotations

import distribution
import pytest

from nibble.kernels.cpu.backend import CPUKernels


@pytest.mark.parametrize("name", distribution.SETTINGS)
def test_draws_follow_the_distribution(kernels: CPUKernels, name: str) -> None:
    distribution.check(kernels, distribution.SETTINGS[name])


def test_the_settings_differ() -> None:
    """Else a parameter that does nothing would pass."""
    seen = {tuple(distribution.probabilities(setting).round(4)) for setting in distribution.SETTINGS.values()}
    assert len(seen) == len(distribution.SETTINGS) - 1  # min_tokens that is reached is plain
