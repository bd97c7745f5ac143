"""What a checkpoint says about its decoder. One decoder (`model.py`) is driven by these numbers."""

from __future__ import annotations

import msgspec


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: angle = position * theta^(-2i/D) / (divisor[i] * linear_factor), cosines and sines times
    attention_factor. Whatever way of scaling a checkpoint names, this is what it comes to (`rope.py`)."""

    theta: float = 10000.0
    frequency_divisors: tuple[float, ...] | None = None  # D / 2 numbers
    linear_factor: float = 1.0
    attention_factor: float = 1.0


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A Llama-family decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    architecture: str  # Hugging Face's model_type, one of ARCHITECTURES
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
    attention_bias: bool = False  # of q, k and v
    qk_norm: bool = False  # RMS norm of each head of q and k, before rotation
    sliding_window: int | None = None  # the newest so many positions, its own included, are what a token attends to
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_features(self) -> int:
        """Rows of the fused q, k, v projection: all q heads, then k, then v."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
