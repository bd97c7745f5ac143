"""Tiny random Llamas: a native checkpoint on disk and the `transformers` model with the very same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nibble.engine.checkpoint.hf_config import write_hf_config
from nibble.engine.checkpoint.native import load_checkpoint, write_checkpoint
from nibble.engine.checkpoint.schema import LinearFormat, linear_sizes
from nibble.engine.model_config import ModelConfig, RopeConfig
from nibble.kernels.interface import Float16Weight, Int4Weight
from nibble.kernels.pack import deinterleave_gate_up, dequantize_int4, pack_int4

Floats = npt.NDArray[np.float32]


def make_tiny_llama(
    directory: Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    intermediate_size: int = 128,
    vocab_size: int = 300,
    tied: bool = True,
    group_size: int = 32,
    seed: int = 0,
    attention_bias: bool = False,
    int8_linears: bool = False,
    rope: RopeConfig | None = None,
    max_context_tokens: int = 512,
) -> LlamaForCausalLM:
    """Write `model.safetensors` and `config.json` into an existing directory; return the same model, fp32, eval.

    `int8_linears` stores every second linear as INT8 with `group_size`. A `rope` with frequency divisors has no
    counterpart in transformers' configuration: the returned model's inverse frequencies are overwritten.
    """
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=1e-5,
        rope=rope or RopeConfig(),
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    int4, int8 = _formats(config, group_size, int8_linears)
    write_checkpoint(
        directory, config, _random_arrays(config, int4, int8, np.random.default_rng(seed)), int4=int4, int8=int8
    )
    write_hf_config(directory, config)
    return load_as_transformers(directory)


def load_as_transformers(directory: Path) -> LlamaForCausalLM:
    """Any native checkpoint, dequantised, as a fp32 `transformers` model."""
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    model = LlamaForCausalLM(_transformers_config(config))
    state = {name: torch.from_numpy(np.array(array)) for name, array in _transformers_arrays(directory)}
    if config.attention_bias:  # transformers' switch adds a bias to o_proj too
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    divisors = torch.tensor(config.rope.frequency_divisors or (1.0,) * (config.head_dim // 2), dtype=torch.float64)
    rotary = model.model.rotary_emb
    rotary.inv_freq = (rotary.inv_freq.double() / (divisors * config.rope.linear_factor)).float()
    return model.float().eval()


def _transformers_config(config: ModelConfig) -> LlamaConfig:
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context_tokens,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=False,
    )
    # Set afterwards: it insists on a hidden size that is a multiple of the heads, which head_dim makes unnecessary.
    theirs.num_attention_heads, theirs.num_key_value_heads = config.num_heads, config.num_kv_heads
    return theirs


def dequantized_linear(directory: Path, name: str) -> Floats:
    """The (N, K) matrix of one linear of a native checkpoint."""
    weight = load_checkpoint(directory).linear(name)
    if isinstance(weight, Int4Weight):
        return dequantize_int4(weight.packed, weight.out_features, weight.in_features, weight.group_size)
    if isinstance(weight, Float16Weight):
        return np.asarray(weight.values, np.float32)
    scales = np.repeat(weight.scales.astype(np.float32), weight.group_size, axis=1)
    matrix: Floats = weight.values.astype(np.float32) * scales
    return matrix


def _formats(
    config: ModelConfig, group_size: int, int8_linears: bool
) -> tuple[dict[str, LinearFormat], dict[str, LinearFormat]]:
    int4, int8 = {}, {}
    for index, (name, (out_features, in_features)) in enumerate(linear_sizes(config).items()):
        if name in ("embedding", "lm_head"):  # one scale per row for the head, small groups for the table
            int8[name] = LinearFormat(out_features, in_features, in_features if name == "lm_head" else 32)
        elif int8_linears and index % 2:
            int8[name] = LinearFormat(out_features, in_features, group_size)
        else:
            int4[name] = LinearFormat(out_features, in_features, group_size)
    return int4, int8


def _random_arrays(
    config: ModelConfig,
    int4: dict[str, LinearFormat],
    int8: dict[str, LinearFormat],
    rng: np.random.Generator,
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Weights of roughly unit gain, and norm weights around 1."""
    for name, linear in int4.items():
        size, groups = (linear.out_features, linear.in_features), linear.in_features // linear.group_size
        scale = rng.uniform(0.5, 1.5, (linear.out_features, groups)) * (0.2 / np.sqrt(linear.in_features))
        minimum = -7.5 * scale * rng.uniform(0.9, 1.1, scale.shape)
        q = rng.integers(0, 16, size, dtype=np.uint8)
        yield name, pack_int4(q, scale.astype(np.float16), minimum.astype(np.float16))
    for name, linear in int8.items():
        size, groups = (linear.out_features, linear.in_features), linear.in_features // linear.group_size
        gain = 0.3 if name == "embedding" else 1.5 / np.sqrt(linear.in_features)
        yield f"{name}.values", rng.integers(-127, 128, size, dtype=np.int8)
        yield (
            f"{name}.scales",
            (rng.uniform(0.5, 1.5, (linear.out_features, groups)) * gain / 127).astype(np.float16),
        )
    norms = [f"layers.{i}.{norm}" for i in range(config.num_layers) for norm in ("attention_norm", "mlp_norm")]
    for name in (*norms, "final_norm"):
        yield name, rng.uniform(0.7, 1.3, config.hidden_size).astype(np.float32)
    if config.attention_bias:
        for i in range(config.num_layers):
            yield f"layers.{i}.qkv.bias", rng.normal(0, 0.3, config.qkv_features).astype(np.float32)


def _transformers_arrays(directory: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    checkpoint = load_checkpoint(directory)
    config = checkpoint.config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", dequantized_linear(directory, "embedding")
    yield "model.norm.weight", checkpoint.array("final_norm")
    if not config.tie_word_embeddings:
        yield "lm_head.weight", dequantized_linear(directory, "lm_head")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        yield f"{theirs}.input_layernorm.weight", checkpoint.array(f"{ours}.attention_norm")
        yield f"{theirs}.post_attention_layernorm.weight", checkpoint.array(f"{ours}.mlp_norm")
        kinds = {"weight": dequantized_linear(directory, f"{ours}.qkv")}
        if config.attention_bias:
            kinds["bias"] = checkpoint.array(f"{ours}.qkv.bias")
        for kind, array in kinds.items():
            for part, rows in zip("qkv", np.split(array, [q, q + kv]), strict=True):
                yield f"{theirs}.self_attn.{part}_proj.{kind}", rows
        yield f"{theirs}.self_attn.o_proj.weight", dequantized_linear(directory, f"{ours}.o")
        gate, up = deinterleave_gate_up(dequantized_linear(directory, f"{ours}.gate_up"))
        yield f"{theirs}.mlp.gate_proj.weight", gate
        yield f"{theirs}.mlp.up_proj.weight", up
        yield f"{theirs}.mlp.down_proj.weight", dequantized_linear(directory, f"{ours}.down")
