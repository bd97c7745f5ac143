"""The decoder: one forward pass of a Llama-family model, top to bottom as in the papers.

Boundary: it calls `Kernels` ops on arrays it never looks into, so it runs on any backend. Which tokens, positions and
blocks is the model runner's business; tokens out of logits is the sampler's. Source: Touvron et al., "LLaMA" (2023);
Ainslie et al., "GQA" (2023).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.checkpoint.native import Checkpoint
from nibble.engine.model_config import ModelConfig
from nibble.engine.rope import inverse_frequencies
from nibble.kernels.interface import (
    Array,
    AttentionBatch,
    AttentionStep,
    Float16Weight,
    Int4Weight,
    Int8Weight,
    Kernels,
    KVChannels,
    Mode,
    Weight,
)
from nibble.kernels.layout import KVDtype, KVLayout


@dataclass(frozen=True)
class Linear:
    """A projection on the device, in whichever format the checkpoint holds it."""

    weight: Weight
    bias: Array | None = None
    order: Array | None = None  # int32 (in_features,): the weight's columns, where it has them in another order

    def __call__(
        self, kernels: Kernels, x: Array, mode: Mode, residual: Array | None = None, gated: bool = False
    ) -> Array:
        """As `Kernels.int4_linear`: x (T, in_features) -> (T, out_features), or added into `residual`, or gated."""
        if self.order is not None:
            x = kernels.permute_columns(x, self.order)
        if isinstance(self.weight, Int4Weight):
            return kernels.int4_linear(x, self.weight, self.bias, residual, mode=mode, gated=gated)
        if isinstance(self.weight, Int8Weight):
            return kernels.int8_linear(x, self.weight, self.bias, residual, mode=mode, gated=gated)
        return kernels.float16_linear(x, self.weight, self.bias, residual, mode=mode, gated=gated)


@dataclass(frozen=True)
class Layer:
    attention_norm: Array  # float32 (H,)
    qkv: Linear
    o: Linear
    mlp_norm: Array  # float32 (H,)
    gate_up: Linear  # rows interleaved, see layout.py
    down: Linear
    q_norm: Array | None  # float32 (D,)
    k_norm: Array | None
    kv_channels: KVChannels | None


@dataclass(frozen=True)
class ForwardBatch:
    """The device arrays that say which T tokens one forward pass computes."""

    ids: Array  # int32 (T,)
    positions: Array  # int32 (T,)
    slots: Array  # int64 (T,), where each token's key and value go: block_id * 64 + offset
    attention: AttentionBatch
    mode: Mode


class DecoderModel:
    """Weights on the device and the forward pass over them."""

    def __init__(self, config: ModelConfig, kernels: Kernels, checkpoint: Checkpoint, kv_layout: KVLayout) -> None:
        self.config = config
        self.kernels = kernels
        self.kv_layout = kv_layout
        has_channels = checkpoint.description.has_kv_channels
        self.num_saturated = kernels.zeros((1,), np.int64) if has_channels else None  # see `KVChannels`
        loader = _Loader(kernels, checkpoint, self.num_saturated)
        self.embedding = loader.table("embedding")
        self.layers = [loader.layer(f"layers.{i}") for i in range(config.num_layers)]
        self.final_norm = loader.array("final_norm")
        self.lm_head = self.embedding if config.tie_word_embeddings else loader.table("lm_head")
        self.rope_table = kernels.rope_table(
            inverse_frequencies(config), config.max_context_tokens, config.rope.attention_factor
        )
        self.weight_bytes = loader.num_bytes

    @classmethod
    def load(cls, kernels: Kernels, checkpoint: Checkpoint, kv_dtype: KVDtype) -> DecoderModel:
        """With a KV cache of this type. Raises UnsupportedModelError, MemoryError."""
        config = checkpoint.config
        layout = checkpoint.description.kv_layout(kv_dtype)
        if not kernels.supports(layout):
            raise UnsupportedModelError(f"head_dim {config.head_dim} is not supported on {kernels.device_name}")
        return cls(config, kernels, checkpoint, layout)

    def forward(self, batch: ForwardBatch, kv_cache: Array) -> Array:
        """Compute all tokens of the batch, appending their keys and values to kv_cache (num_layers, num_blocks, ...).

        Returns the residual stream float32 (T, H) after the last layer.
        """
        kernels, mode, eps = self.kernels, batch.mode, self.config.rms_norm_eps
        attention = replace(batch.attention, window=self.config.sliding_window)
        plan = kernels.plan_attention(attention, self.kv_layout, len(batch.ids), mode=mode)
        step = AttentionStep(attention, batch.positions, batch.slots, self.rope_table, plan)
        has_channels = self.kv_layout.dtype is KVDtype.INT8_CHANNEL
        x = kernels.embedding(batch.ids, self.embedding)  # (T, H), the residual stream
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            with kernels.temporaries():
                h = kernels.rms_norm(x, layer.attention_norm, eps)
                qkv = layer.qkv(kernels, h, mode)  # (T, (num_heads + 2 num_kv_heads) D)
                if layer.q_norm is not None:
                    kernels.norm_heads(qkv, layer.q_norm, layer.k_norm, eps, self.kv_layout)
                channels = layer.kv_channels if has_channels else None
                attended = kernels.attention(qkv, cache, step, self.kv_layout, channels, mode=mode)
                layer.o(kernels, attended, mode, residual=x)
                h = kernels.rms_norm(x, layer.mlp_norm, eps)
                h = layer.gate_up(kernels, h, mode, gated=True)  # (T, I)
                layer.down(kernels, h, mode, residual=x)
        return x

    def logits(self, x: Array, rows: Array) -> Array:
        """Logits float32 (S, vocab_size) of S rows of what `forward` returned, rows int32 (S,).

        Always batch-invariant: S is small, and the first sampled token must not depend on who else is prefilled.
        """
        kernels = self.kernels
        last = kernels.rms_norm(kernels.gather_rows(x, rows), self.final_norm, self.config.rms_norm_eps)  # (S, H)
        return kernels.logits(last, self.lm_head)

    def first_layer(self) -> DecoderModel:
        """The same model, cut off after its first layer; the arrays are shared."""
        model = copy.copy(self)
        model.config = msgspec.structs.replace(self.config, num_layers=1)
        model.layers = self.layers[:1]
        return model


class _Loader:
    """Moves a checkpoint's tensors to the device and counts their bytes."""

    def __init__(self, kernels: Kernels, checkpoint: Checkpoint, num_saturated: Array | None) -> None:
        self._num_saturated = num_saturated
        self.kernels = kernels
        self.checkpoint = checkpoint
        self.num_bytes = 0

    def array(self, name: str) -> Array:
        return self._to_device(self.checkpoint.array(name))

    def table(self, name: str) -> Int8Weight | Float16Weight:
        weight = self._weight(name)
        assert not isinstance(weight, Int4Weight), f"{name} is INT4"
        return weight

    def layer(self, prefix: str) -> Layer:
        return Layer(
            attention_norm=self.array(f"{prefix}.attention_norm"),
            qkv=self._linear(f"{prefix}.qkv"),
            o=self._linear(f"{prefix}.o"),
            mlp_norm=self.array(f"{prefix}.mlp_norm"),
            gate_up=self._linear(f"{prefix}.gate_up"),
            down=self._linear(f"{prefix}.down"),
            q_norm=self._optional(f"{prefix}.q_norm"),
            k_norm=self._optional(f"{prefix}.k_norm"),
            kv_channels=self._channels(f"{prefix}.kv_channels"),
        )

    def _linear(self, name: str) -> Linear:
        return Linear(self._weight(name), self._optional(f"{name}.bias"), self._optional(f"{name}.order"))

    def _channels(self, name: str) -> KVChannels | None:
        return KVChannels(self.array(name), self._num_saturated) if self.checkpoint.has(name) else None

    def _optional(self, name: str) -> Array | None:
        return self.array(name) if self.checkpoint.has(name) else None

    def _weight(self, name: str) -> Weight:
        weight = self.checkpoint.linear(name)
        if isinstance(weight, Int4Weight):
            packed = self._to_device(weight.packed)
            return Int4Weight(packed, weight.out_features, weight.in_features, weight.group_size)
        values = self._to_device(weight.values)
        if isinstance(weight, Float16Weight):
            return Float16Weight(values)
        return Int8Weight(values, self._to_device(weight.scales), weight.group_size)

    def _to_device(self, array: Array) -> Array:
        self.num_bytes += int(array.nbytes)
        return self.kernels.to_device(array)
