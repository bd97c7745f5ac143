"""`config.json` in the form that Hugging Face tools expect: what a gateway and a tokenizer loader want to know.

It describes the model for people and for `transformers.AutoTokenizer`; weights cannot be loaded with it. Scaling of
rotary frequencies that is a list of divisors by now is left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from nibble.engine.checkpoint.errors import ConversionError
from nibble.engine.model_config import ARCHITECTURES, ModelConfig


def write_hf_config(directory: Path, config: ModelConfig) -> None:
    """Raises ConversionError where the disk does not hold it."""
    write_json(directory / "config.json", _hf_config(config))


def write_json(path: Path, value: Any) -> None:
    """Indented. Raises ConversionError where the disk does not hold it."""
    write_file(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """On the disk, not only in its cache, when this returns. Raises ConversionError where the disk does not hold it."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written: {error.strerror}") from error


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.linear_factor != 1.0:
        rope = {"rope_type": "linear", "rope_theta": config.rope.theta, "factor": config.rope.linear_factor}
    eos: int | list[int] | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) < 2:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    return {
        "architectures": [ARCHITECTURES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "sliding_window": config.sliding_window,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
    }
