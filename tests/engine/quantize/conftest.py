"""Small tensors with the traits that make quantisation hard: some channels are loud, and channels go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def weights() -> Tensor:
    """(24, 64), with a few outliers."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(24, 64, generator=generator) * 0.05
    w[torch.arange(24), torch.randint(0, 64, (24,), generator=generator)] *= 6
    return w


@pytest.fixture
def inputs() -> Tensor:
    """(300, 64), correlated, channel 5 twenty times as loud as the rest."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8
    x[:, 5] *= 20
    return x
