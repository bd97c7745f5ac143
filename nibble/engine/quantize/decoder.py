"""The decoder of `engine/model.py` in plain torch, over unquantised weights, one layer at a time, in four steps.

What calibration and the evaluation of simulated quantisation run: between two steps lie the inputs of one group of
linears. Not for serving: no cache, whole sequences only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from nibble.engine.checkpoint.source import Source
from nibble.engine.model_config import ModelConfig
from nibble.engine.rope import inverse_frequencies

Layer: TypeAlias = dict[str, Tensor]  # by the names of PARTS; matrices (out_features, in_features), the rest vectors

PARTS = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q.bias": "self_attn.q_proj.bias",
    "k.bias": "self_attn.k_proj.bias",
    "v.bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
INPUTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}  # who reads which input
LINEARS = tuple(name for names in INPUTS.values() for name in names)

KVTransform: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # rotated keys, values: (B, kv heads, T, D)


def _as_they_are(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def source_name(index: int, part: str) -> str:
    """What a `Source` calls a part of a layer."""
    return f"model.layers.{index}.{PARTS[part]}"


def has_part(config: ModelConfig, part: str) -> bool:
    if part.endswith(".bias"):
        return config.attention_bias
    return config.qk_norm or part not in ("q_norm", "k_norm")


def read_layer(source: Source, index: int, device: torch.device) -> Layer:
    """One layer in float32. Raises CheckpointError."""
    parts = [part for part in PARTS if has_part(source.config, part)]
    return {part: torch.from_numpy(source.floats(source_name(index, part))).to(device) for part in parts}


def lowered(layer: Layer, dtype: torch.dtype) -> Layer:
    """The same layer with its matrices in the precision of computation."""
    return {part: weight.to(dtype) if weight.dim() == 2 else weight for part, weight in layer.items()}


def qkv_input(layer: Layer, x: Tensor, config: ModelConfig) -> Tensor:
    """Residual stream float32 (B, T, H) -> (B, T, H) in the precision of computation, as all inputs of linears."""
    return rms_norm(x, layer["attention_norm"], config.rms_norm_eps).to(layer["q"].dtype)


def o_input(layer: Layer, h: Tensor, config: ModelConfig, transform: KVTransform = _as_they_are) -> Tensor:
    """What attention makes of `qkv_input`: (B, T, num_heads * D). Positions are 0 to T - 1."""
    q, k, v = (project(layer, name, h).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for name in INPUTS["qkv"])
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config.rms_norm_eps), rms_norm(k, layer["k_norm"], config.rms_norm_eps)
    cos, sin = rope_table(config, h.shape[1], h.device)
    k, v = transform(rotate(k, cos, sin), v)
    q, k, v = (each.to(h.dtype) for each in (rotate(q, cos, sin), k, v))
    mask = _window_mask(h.shape[1], config.sliding_window, h.device)
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2)


def gate_up_input(layer: Layer, x: Tensor, config: ModelConfig) -> Tensor:
    """Residual stream after attention (B, T, H) -> (B, T, H)."""
    return rms_norm(x, layer["mlp_norm"], config.rms_norm_eps).to(layer["gate"].dtype)


def down_input(layer: Layer, h: Tensor) -> Tensor:
    """(B, T, H) -> (B, T, I)."""
    return (silu(project(layer, "gate", h)) * project(layer, "up", h)).to(h.dtype)


def project(layer: Layer, name: str, h: Tensor) -> Tensor:
    """The linear's output, float32."""
    y = (h @ layer[name].T).float()
    bias = layer.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_forward(layer: Layer, x: Tensor, config: ModelConfig, transform: KVTransform = _as_they_are) -> Tensor:
    """The residual stream float32 (B, T, H) after the layer, a new tensor."""
    x = x + project(layer, "o", o_input(layer, qkv_input(layer, x, config), config, transform))
    return x + project(layer, "down", down_input(layer, gate_up_input(layer, x, config)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (T, D / 2)."""
    frequencies = torch.tensor(inverse_frequencies(config), dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
    factor = config.rope.attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D), pairs half a head apart."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of the T positions (second axis) each (first axis) attends to, where it is not just all before it."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
