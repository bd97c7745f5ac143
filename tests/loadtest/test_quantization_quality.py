"""The simulation's layers are those of the checkpoint, in the order of the inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hf_models import random_hf_model
from packed_models import gptq, save_packed_model

from loadtest.quantization_quality import native_layers
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import convert_model


@pytest.mark.parametrize("reordered", [False, True])
def test_layers_of_another_quantiser_are_what_its_numbers_stand_for(tmp_path: Path, reordered: bool) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": reordered}
    model = random_hf_model("llama")
    weights = save_packed_model(
        model, tmp_path / "packed", gptq, config, group_size=32, symmetric=False, reordered=reordered
    )
    convert_model(tmp_path / "packed", tmp_path / "native", lambda stage, done: None)
    checkpoint = load_checkpoint(tmp_path / "native")
    assert bool(checkpoint.description.ordered) == reordered
    for index, layer in enumerate(native_layers(checkpoint)):
        for name in ("v", "o", "gate", "up", "down"):  # q and k may be balanced
            block = "mlp" if name in ("gate", "up", "down") else "self_attn"
            expected = weights[f"model.layers.{index}.{block}.{name}_proj.weight"].weights()
            tolerance = 2e-3 * np.abs(expected).max()  # scale times zero is stored in fp16
            np.testing.assert_allclose(layer[name].numpy(), expected, atol=tolerance)
