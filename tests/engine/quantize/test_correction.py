"""The correction against its definition, and that it holds the quantised model's stream at the original's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import random_hf_model, save_hf_model

from nibble.engine.checkpoint.source import open_source
from nibble.engine.quantize import correction
from nibble.engine.quantize.correction import STRENGTH, corrected, missing_output
from nibble.engine.quantize.decoder import read_layer
from nibble.engine.quantize.gptq import damped
from nibble.engine.quantize.layer import LayerQuantizer
from nibble.engine.quantize.options import Method
from nibble.engine.quantize.statistics import gram

DAMPING = 0.05


@pytest.mark.parametrize("writes_to_residual", [False, True])
def test_correction_goes_half_way_to_the_best_weights(writes_to_residual: bool) -> None:
    """The best by least squares over all tokens, with damping as further rows that hold the weights where they are."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 3, 20, 8, generator=generator)  # batches of (B, T, K)
    actual = exact + 0.3 * torch.randn(exact.shape, generator=generator)
    behind = 0.2 * torch.randn(2, 3, 20, 5, generator=generator)
    w = torch.randn(5, 8, generator=generator)
    hessian = damped(gram(actual), DAMPING)
    missing = torch.zeros_like(w)
    for h, a, residual in zip(exact, actual, behind, strict=True):
        missing += missing_output(w, h, a, residual if writes_to_residual else None)

    rows, wanted = actual.reshape(-1, 8).double(), (exact @ w.T).reshape(-1, 5).double()
    if writes_to_residual:
        wanted += behind.reshape(-1, 5)
    hold = (DAMPING * gram(actual).diagonal().mean().double()).sqrt() * torch.eye(8, dtype=torch.float64)
    best = torch.linalg.lstsq(torch.cat((rows, hold)), torch.cat((wanted, hold @ w.T.double()))).solution.T
    assert (best - w).abs().max() > 0.05
    torch.testing.assert_close(corrected(w, hessian, missing), (w + STRENGTH * (best - w)).float())


def test_inputs_that_are_right_need_no_correction() -> None:
    w, h = torch.randn(5, 8), torch.randn(2, 20, 8)
    assert not missing_output(w, h, h, torch.zeros(2, 20, 5)).any()


def test_corrected_layers_stay_nearer_to_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(save_hf_model(random_hf_model("qwen2", num_hidden_layers=3), tmp_path, "float32"))
    layers = [read_layer(source, index, torch.device("cpu")) for index in range(3)]
    x = torch.randn(16, 64, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x @ torch.randn(x.shape[-1], x.shape[-1], generator=torch.Generator().manual_seed(1)) / 8  # correlated

    def distance(strength: float) -> float:
        monkeypatch.setattr(correction, "STRENGTH", strength)
        quantizer = LayerQuantizer([x[:8], x[8:]], source.config, Method.AWQ_GPTQ, 32, torch.float32)
        for layer in layers:
            quantizer.quantize(layer)
        pairs = zip(quantizer.exact.x, quantizer.actual.x, strict=True)
        return float(sum((exact - actual).square().sum() for exact, actual in pairs))

    assert distance(STRENGTH) < 0.9 * distance(0.0)
