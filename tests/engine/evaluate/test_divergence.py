"""Quality measures against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nibble.engine.evaluate.divergence import Comparison


def test_measures_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, (300, 50)).astype(np.float32)
    logits = reference + rng.normal(0, 0.5, (300, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 300)
    targets[-1] = -1  # nobody knows what comes after the end
    comparison = Comparison()
    for rows in (slice(0, 170), slice(170, 300)):
        comparison.add(*(torch.from_numpy(each[rows]) for each in (reference, logits, targets)))
    result = comparison.result()
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, logits))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert result.mean_kl == pytest.approx(float(divergence.mean()))
    assert result.p99_kl == pytest.approx(float(divergence.quantile(0.99)))
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    loss = torch.nn.functional.nll_loss(q[:-1], torch.from_numpy(targets[:-1]))
    assert result.perplexity == pytest.approx(float(loss.exp()))
    assert result.num_tokens == 300


def test_a_model_agrees_with_itself() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 9, (70, 30)).astype(np.float32))
    comparison = Comparison()
    comparison.add(logits, logits.clone(), torch.zeros(70, dtype=torch.int64))
    result = comparison.result()
    assert (result.mean_kl, result.p99_kl, result.top1_agreement) == (0.0, 0.0, 1.0)
