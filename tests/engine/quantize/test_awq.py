"""AWQ's scales: they change no function, and they help where channels are loud."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import random_hf_model, save_hf_model
from torch import Tensor

from nibble.engine.checkpoint.source import open_source
from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.awq import channel_scales, fold_layer_scales, fold_scales, search_layer_scales
from nibble.engine.quantize.decoder import INPUTS, Layer, layer_forward, read_layer
from nibble.engine.quantize.layer import round_layer
from nibble.engine.quantize.options import Method


def first_layer(directory: Path, model_type: str) -> tuple[Layer, ModelConfig, Tensor]:
    source = open_source(save_hf_model(random_hf_model(model_type), directory, "float32"))
    x = torch.randn(2, 48, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return read_layer(source, 0, torch.device("cpu")), source.config, x


@pytest.mark.parametrize("key", INPUTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_folded_scales_leave_the_function_alone(tmp_path: Path, model_type: str, key: str) -> None:
    layer, config, x = first_layer(tmp_path, model_type)
    size = layer[INPUTS[key][0]].shape[1]
    scales = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5
    if key == "o":  # alike for the query heads of a kv head
        per_value = scales.view(config.num_kv_heads, -1, config.head_dim)[:, :1]
        scales = per_value.expand(-1, config.num_heads // config.num_kv_heads, -1).flatten()
    folded = fold_scales(layer, key, scales, config)
    assert any(not torch.equal(folded[part], layer[part]) for part in layer)
    torch.testing.assert_close(layer_forward(folded, x, config), layer_forward(layer, x, config), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_scaled_layer_is_the_same_function_and_rounds_better(tmp_path: Path, model_type: str) -> None:
    layer, config, x = first_layer(tmp_path, model_type)
    layer["attention_norm"][:4] *= 30  # loud channels, as real models have
    layer["mlp_norm"][7] *= 30
    expected = layer_forward(layer, x, config)
    scaled = fold_layer_scales(layer, search_layer_scales(layer, x, config, 32, torch.float32), config)
    torch.testing.assert_close(
        layer_forward(scaled, x, config), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )

    def error(layer: Layer) -> float:
        rounded = round_layer(layer, config, Method.RTN, 32).dequantized()
        return float((layer_forward(rounded, x, config) - expected).square().mean())

    assert error(scaled) < 0.5 * error(layer)


def test_scales_are_centred_powers() -> None:
    activation, weight = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([1.0, 1.0, 1.0])
    torch.testing.assert_close(channel_scales(activation, weight, 0.5), torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close(channel_scales(activation, weight, 0.0), torch.ones(3))
