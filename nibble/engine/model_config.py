"""What a checkpoint says about its decoder. One decoder (`model.py`) is driven by these numbers."""

from __future__ import annotations

import msgspec


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding. `frequency_divisors` (D / 2 numbers) are Llama 3's and longrope's per-frequency factors as
    GGUF stores them: angle = position * theta^(-2i/D) / divisor[i]."""

    theta: float = 10000.0
    frequency_divisors: tuple[float, ...] | None = None
    linear_factor: float = 1.0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    architecture: str  # "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_features(self) -> int:
        """Rows of the fused q, k, v projection: all q heads, then k, then v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
