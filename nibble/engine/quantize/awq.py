"""AWQ: input channels that carry large activations are scaled up before rounding, and the inverse goes into the op
before, where it costs nothing. Lin et al., "AWQ" (2023).

The scales are those, of 20 points between activations' and weights' magnitudes, with which a block's output changes
least when its linears are rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.engine.model_config import ModelConfig
from nibble.engine.quantize.decoder import (
    INPUTS,
    Layer,
    down_input,
    gate_up_input,
    lowered,
    o_input,
    project,
    qkv_input,
)
from nibble.engine.quantize.grid import fitting_group_size, minmax_grid, round_to_nearest

NUM_POINTS = 20
_LEAST = 1e-5  # of a magnitude, which is divided by


def search_layer_scales(
    layer: Layer, x: Tensor, config: ModelConfig, group_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Channel scales (K,) for each of INPUTS, to be folded in this order. x: some residual stream (B, T, H) to judge
    by."""
    found = {}
    for key in INPUTS:
        low = lowered(layer, dtype)
        h = _input(low, key, x, config)
        found[key] = _search_scales(layer, key, h, config, group_size)
        layer = fold_scales(layer, key, found[key], config)
        if key == "o":
            x = x + project(low, "o", h)
    return found


def fold_layer_scales(layer: Layer, scales: dict[str, Tensor], config: ModelConfig) -> Layer:
    """The same function with channels scaled for rounding."""
    for key, each in scales.items():
        layer = fold_scales(layer, key, each, config)
    return layer


def _input(layer: Layer, key: str, x: Tensor, config: ModelConfig) -> Tensor:
    """x: the residual stream in front of attention, or of the MLP."""
    if key in ("qkv", "o"):
        h = qkv_input(layer, x, config)
        return h if key == "qkv" else o_input(layer, h, config)
    h = gate_up_input(layer, x, config)
    return h if key == "gate_up" else down_input(layer, h)


def _block_output(layer: Layer, key: str, h: Tensor, config: ModelConfig) -> Tensor:
    """What attention or the MLP adds to the residual stream, from the inputs `key` on."""
    if key in ("qkv", "o"):
        return project(layer, "o", o_input(layer, h, config) if key == "qkv" else h)
    return project(layer, "down", down_input(layer, h) if key == "gate_up" else h)


def fold_scales(layer: Layer, key: str, scales: Tensor, config: ModelConfig) -> Layer:
    """The layer with the inputs `key` divided by scales (K,) and the weights that read them multiplied."""
    folded = layer | {name: layer[name] * scales for name in INPUTS[key]}
    if key in ("qkv", "gate_up"):
        norm = "attention_norm" if key == "qkv" else "mlp_norm"
        return folded | {norm: layer[norm] / scales}
    if key == "down":
        return folded | {"up": layer["up"] / scales[:, None]}
    rows = scales.view(config.num_kv_heads, -1, config.head_dim)[
        :, 0
    ].flatten()  # alike for all heads that read a value
    folded["v"] = layer["v"] / rows[:, None]
    if config.attention_bias:
        folded["v.bias"] = layer["v.bias"] / rows
    return folded


def channel_scales(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """activation^alpha / weight^(1 - alpha), (K,), centred: the least and the greatest are each other's inverses."""
    scales = activation.clamp(min=_LEAST).pow(alpha) / weight.clamp(min=_LEAST).pow(1 - alpha)
    return scales / (scales.max() * scales.min()).sqrt()


def weight_magnitude(w: Tensor, group_size: int) -> Tensor:
    """The mean over rows of |w| relative to the greatest of its group, (K,)."""
    groups = w.abs().unflatten(1, (-1, group_size))
    return (groups / groups.amax(-1, keepdim=True).clamp(min=_LEAST)).flatten(1).mean(0)


def _search_scales(layer: Layer, key: str, h: Tensor, config: ModelConfig, group_size: int) -> Tensor:
    names = INPUTS[key]
    size = fitting_group_size(group_size, h.shape[-1])
    activation = h.float().abs().flatten(0, -2).mean(0)
    weight = weight_magnitude(torch.cat([layer[name] for name in names]), size)
    if key == "o":
        activation, weight = _tied(activation, config), _tied(weight, config)
    low = lowered(layer, h.dtype)
    wanted = _block_output(low, key, h, config)

    def loss(scales: Tensor) -> float:
        scaled = {name: layer[name] * scales for name in names}
        rounded = {
            name: (round_to_nearest(w, minmax_grid(w, size)).dequantized() / scales).to(h.dtype)
            for name, w in scaled.items()
        }
        return float((_block_output(low | rounded, key, h, config) - wanted).square().mean())

    candidates = [channel_scales(activation, weight, point / NUM_POINTS) for point in range(NUM_POINTS)]
    return min([torch.ones_like(activation), *candidates], key=loss)


def _tied(magnitude: Tensor, config: ModelConfig) -> Tensor:
    """(num_heads * D,) averaged over the heads that read the same value."""
    groups = magnitude.view(config.num_kv_heads, -1, config.head_dim)
    return groups.mean(1, keepdim=True).expand_as(groups).flatten()
