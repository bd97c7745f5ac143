"""Tiny random Hugging Face models of any architecture and options: in `transformers`, and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_tokenizer import write_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nibble.engine.checkpoint.hf_source import HuggingFaceSource
from nibble.engine.checkpoint.source import Int4Rows, RowFormat, Rows

VOCAB_SIZE = 300


def random_hf_model(model_type: str, **options: Any) -> PreTrainedModel:
    """fp32, eval, with weights that fp16 holds exactly and logits of order one. options: of its configuration."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **defaults | options)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            gain = 0.2 if is_norm else 0.3 if name.endswith("bias") or "embed" in name else parameter.shape[-1] ** -0.5
            parameter.copy_((torch.randn_like(parameter) * gain + is_norm).half())
    return model.float().eval()


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize_linears(model: PreTrainedModel, group_size: int = 32) -> dict[str, Int4Rows]:
    """Round the model's linears to a 4-bit grid, in place; what their weights are then made of, by name."""
    quantized = {}
    for name, parameter in model.named_parameters():
        if not name.removesuffix(".weight").endswith(LINEARS):
            continue
        groups = parameter.detach().numpy().reshape(parameter.shape[0], -1, group_size)
        minimum = groups.min(axis=2).astype(np.float16)
        scale = (np.ptp(groups, axis=2) / 15).astype(np.float16)
        base, step = minimum.astype(np.float32)[:, :, None], scale.astype(np.float32)[:, :, None]
        q = np.clip(np.rint((groups - base) / step), 0, 15)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(q * step + base).reshape(parameter.shape))
        quantized[name] = Int4Rows(q.astype(np.uint8).reshape(parameter.shape), scale, minimum)
    return quantized


class QuantizedSource(HuggingFaceSource):
    """A saved model some of whose matrices are given in 4 bits."""

    def __init__(self, directory: Path, quantized: dict[str, Int4Rows]) -> None:
        super().__init__(directory)
        self._quantized = quantized

    def format(self, name: str) -> RowFormat:
        rows = self._quantized.get(name)
        return RowFormat("int4", rows.q.shape[1] // rows.scale.shape[1]) if rows else super().format(name)

    def rows(self, name: str) -> Rows:
        return self._quantized.get(name) or super().rows(name)


def save_hf_model(model: PreTrainedModel, directory: Path, dtype: str = "float16", **options: Any) -> Path:
    """As its author would: weights in `dtype`, a tokenizer. options: of `save_pretrained`."""
    model.to(getattr(torch, dtype)).save_pretrained(directory, **options)
    model.float()
    write_tiny_tokenizer(directory)
    return directory
