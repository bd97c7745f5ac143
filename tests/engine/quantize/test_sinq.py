"""SINQ's factors: they take out what channels differ by, fold into the ops before, and need no text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import random_hf_model, save_hf_model

from nibble.engine.checkpoint.source import open_source
from nibble.engine.quantize.awq import fold_layer_scales
from nibble.engine.quantize.decoder import layer_forward, read_layer
from nibble.engine.quantize.layer import round_layer
from nibble.engine.quantize.options import Method
from nibble.engine.quantize.sinq import column_factors, even_layer_scales


def test_factors_of_channels_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(400, 64, generator=generator)
    factors = (torch.rand(64, generator=generator) * 2 - 1).exp()
    rows = (torch.rand(400, 1, generator=generator) * 2 - 1).exp()
    found = column_factors(even * rows * factors)
    torch.testing.assert_close(found, factors / factors.log().mean().exp(), rtol=0.15, atol=0)
    torch.testing.assert_close(found.log().mean(), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_channels_of_zeros_do_no_harm() -> None:
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    w[:, 3] = 0
    assert column_factors(w).isfinite().all()
    assert column_factors(torch.zeros(16, 32)).isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_evened_layer_is_the_same_function_and_rounds_better(tmp_path: Path, model_type: str) -> None:
    source = open_source(save_hf_model(random_hf_model(model_type), tmp_path, "float32"))
    config, layer = source.config, read_layer(source, 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name in ("q", "k", "v", "gate", "up"):  # some channels stand out of their groups, as in real models
        layer[name][:, ::16] *= 6
    x = torch.randn(2, 48, config.hidden_size, generator=generator)
    expected = layer_forward(layer, x, config)
    scales = even_layer_scales(layer, config)
    same = layer_forward(fold_layer_scales(layer, scales, config), x, config)
    torch.testing.assert_close(same, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    def error(method: Method) -> float:
        rounded = round_layer(layer, config, method, 32).dequantized()
        return float((layer_forward(rounded, x, config) - expected).square().mean())

    assert error(Method.SINQ) < 0.7 * error(Method.RTN)
