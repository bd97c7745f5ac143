"""The architectures and options that are served, as tiny models: what tests compare with `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hf_models import VOCAB_SIZE, QuantizedSource, quantize_linears, random_hf_model, save_hf_model
from model_logits import all_logits, transformers_logits
from transformers import PreTrainedModel

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.kernels.interface import Kernels, Mode
from nibble.kernels.layout import KVDtype

NUM_TOKENS = 150


@dataclass(frozen=True)
class Architecture:
    """A model_type and options of its configuration."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

ARCHITECTURES = {
    "llama": Architecture("llama"),
    "llama, tied, one kv head, head_dim 128": Architecture(
        "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 128}
    ),
    "llama, head_dim 96": Architecture("llama", {"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama, head_dim 256": Architecture("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama, rope linear": Architecture("llama", rope(rope_type="linear", factor=4.0)),
    "llama, rope dynamic": Architecture("llama", rope(rope_type="dynamic", factor=2.0)),
    "llama, rope llama3": Architecture("llama", rope(rope_type="llama3", **LLAMA3)),
    "llama, rope yarn": Architecture("llama", rope(**YARN)),
    "mistral": Architecture("mistral", {"sliding_window": None}),
    "mistral, sliding window": Architecture("mistral", {"sliding_window": 37}),
    "qwen2": Architecture("qwen2"),
    "qwen2, tied, rope yarn": Architecture("qwen2", {"tie_word_embeddings": True, **rope(**YARN, truncate=False)}),
    "qwen3": Architecture("qwen3", {"tie_word_embeddings": True, "head_dim": 128}),
}  # fmt: skip


def native_architecture(directory: Path, name: str, is_int4: bool) -> tuple[Path, PreTrainedModel]:
    """A native directory, and the model with the same weights."""
    architecture = ARCHITECTURES[name]
    model = random_hf_model(architecture.model_type, **architecture.options)
    quantized = quantize_linears(model) if is_int4 else {}
    source = QuantizedSource(save_hf_model(model, directory / "source", "float32"), quantized)
    native = directory / "native"
    native.mkdir()
    convert_checkpoint(source, native, lambda stage, done: None)
    return native, model


def check_logits(kernels: Kernels, native: Path, model: PreTrainedModel, mode: Mode, tolerance: float) -> None:
    """NUM_TOKENS tokens, in chunks, with an fp16 cache; tolerance: relative to the largest logit."""
    ids = np.random.default_rng(1).integers(0, VOCAB_SIZE, NUM_TOKENS).tolist()
    expected = transformers_logits(model, ids)
    logits = all_logits(native, kernels, ids, KVDtype.FP16, mode, [70, 1, 1, 78])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())
