"""The calibration decoder, layer after layer, against `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import VOCAB_SIZE, random_hf_model, save_hf_model

from nibble.engine.checkpoint.source import open_source
from nibble.engine.quantize.decoder import layer_forward, lowered, read_layer

CPU = torch.device("cpu")
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": YARN},
    "mistral": {"sliding_window": 13},
    "qwen2": {},
    "qwen3": {},
}


@pytest.mark.parametrize("model_type", CASES)
def test_residual_stream_after_every_layer(tmp_path: Path, model_type: str) -> None:
    model = random_hf_model(model_type, **CASES[model_type])
    source = open_source(save_hf_model(model, tmp_path, "float32"))
    ids = torch.randint(0, VOCAB_SIZE, (2, 90), generator=torch.Generator().manual_seed(0))
    expected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: expected.append(output))
    with torch.inference_mode():
        model(ids)
        x = torch.from_numpy(source.floats("model.embed_tokens.weight"))[ids]
        for index, stream in enumerate(expected):
            x = layer_forward(read_layer(source, index, CPU), x, source.config)
            torch.testing.assert_close(x, stream, rtol=1e-3, atol=1e-4)


def test_lower_precision_is_close(tmp_path: Path) -> None:
    source = open_source(save_hf_model(random_hf_model("llama"), tmp_path, "float32"))
    layer = read_layer(source, 0, CPU)
    x = torch.randn(1, 40, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = layer_forward(layer, x, source.config)
        lower = layer_forward(lowered(layer, torch.bfloat16), x, source.config)
    assert lower.dtype == torch.float32
    assert (lower - exact).abs().max() < 0.05 * exact.abs().max()
