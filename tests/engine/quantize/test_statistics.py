"""Statistics that are added up are those of all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.quantize.statistics import ChannelStatistics, gram


def test_statistics_of_batches_are_those_of_the_whole(inputs: Tensor) -> None:
    statistics = ChannelStatistics((64,), torch.device("cpu"))
    for batch in inputs.split(70):
        statistics.add(batch[None])
    expected = {
        "min": inputs.amin(0),
        "max": inputs.amax(0),
        "absmax": inputs.abs().amax(0),
        "mean": inputs.mean(0),
        "absmean": inputs.abs().mean(0),
    }
    results = statistics.results()
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(results[name], values, msg=name)


def test_statistics_keep_heads_apart() -> None:
    keys = torch.randn(5, 7, 2, 16, generator=torch.Generator().manual_seed(0))  # (B, T, kv heads, D)
    statistics = ChannelStatistics((2, 16), torch.device("cpu"))
    statistics.add(keys)
    torch.testing.assert_close(statistics.results()["max"], keys.amax((0, 1)))


def test_gram_adds_up_over_tokens(inputs: Tensor) -> None:
    torch.testing.assert_close(gram(inputs[:100]) + gram(inputs[100:]), inputs.T @ inputs, rtol=1e-4, atol=1e-2)
