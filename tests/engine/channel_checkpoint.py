"""A tiny checkpoint whose KV cache has static scales, for tests of it on both backends."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from hf_models import random_hf_model, save_hf_model
from tokenizers import Tokenizer

from nibble.engine.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from nibble.engine.quantize.options import KVScales, Method, Options
from nibble.engine.quantize.quantize import quantize

TEXT = "".join(np.random.default_rng(1).choice(list("abcdefgh \n"), 6000))


def make_channel_checkpoint(directory: Path, method: Method) -> Path:
    source = save_hf_model(random_hf_model("qwen2", num_hidden_layers=2), directory / "model", "float32")
    text = directory / "text.txt"
    text.write_text(TEXT)
    options = Options(method, 32, text, 6, 96, "cpu", KVScales.CHANNEL)
    quantize(source, directory / "out", options, lambda stage, done: None)
    return directory / "out"


def calibrated_ids(checkpoint: Path) -> list[int]:
    """150 tokens of the calibration text: other tokens of a random model have other keys."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode(TEXT, add_special_tokens=False).ids
    return token_ids[:150]


def with_scales(checkpoint: Path, out: Path, factor: float) -> Path:
    """A copy whose channels have scales `factor` times as large."""
    shutil.copytree(checkpoint, out)
    file = SafetensorsFile(checkpoint / "model.safetensors")
    arrays = {name: file.array(name).copy() for name in file.specs}
    for name, array in arrays.items():
        if name.endswith("kv_channels"):
            array[:, :, 0] *= factor
    write_safetensors(out / "model.safetensors", file.specs, file.metadata, arrays.items())
    return out
