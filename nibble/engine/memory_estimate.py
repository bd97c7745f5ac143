"""How a GPU's memory would be shared out, from a model's configuration alone: before anything is loaded or downloaded.

Weights, KV blocks and buffers are exact: sums over the same shapes that are allocated. What `memory_plan.py` finds out
by running (temporaries, captured graphs, the driver's own) is estimated, on the high side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nibble.engine.batch import MAX_VERIFIED_TOKENS
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.checkpoint.configured_source import ConfiguredSource
from nibble.engine.checkpoint.convert import describe
from nibble.engine.checkpoint.kind import Kind, kind_of
from nibble.engine.checkpoint.native import read_description
from nibble.engine.checkpoint.schema import (
    FORMAT_VERSION,
    Description,
    LinearFormat,
    TensorSpec,
    linear_sizes,
    tensor_specs,
)
from nibble.engine.checkpoint.source import open_source
from nibble.engine.memory_plan import IDLE_BLOCKS, SLACK_BYTES
from nibble.engine.model_config import ModelConfig
from nibble.engine.pass_shapes import max_input_bytes
from nibble.kernels.layout import BLOCK_SIZE, GROUP_SIZES, KVDtype
from nibble.kernels.sampling import LOGPROB_WORDS
from nibble.kernels.slots import SlotLayout, mask_words

DRIVER_BYTES = 640 << 20  # CUDA context and loaded kernels, measured on an H100: 520 MiB
SCRATCH_BYTES = 192 << 20  # partial sums of attention and linears, slabs of dequantised weights
INT8_GROUP = 32
COUNTER_BYTES = 8  # `DecoderModel.num_saturated`
_ITEM_BYTES = {"F32": 4, "I32": 4, "F16": 2, "U8": 1, "I8": 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a GPU. num_tokens: that the KV cache holds; below 0 where not even the rest fits."""

    total_bytes: int
    weight_bytes: int
    buffer_bytes: int
    reserve_bytes: int  # estimated
    kv_token_bytes: float
    kv_cache_bytes: int
    num_tokens: int


def native_description(config: ModelConfig, group_size: int | None) -> Description:
    """What converting (group_size None: to fp16) or quantising makes of a model that is stored in floating point."""
    sizes = linear_sizes(config)
    if group_size is None:
        return Description(format_version=FORMAT_VERSION, config=config, int4={}, int8={}, float16=tuple(sizes))
    head = "embedding" if config.tie_word_embeddings else "lm_head"
    int4 = {
        name: LinearFormat(*size, max(g for g in GROUP_SIZES if g <= group_size and size[1] % g == 0))
        for name, size in sizes.items()
        if name not in ("embedding", "lm_head")
    }
    return Description(
        format_version=FORMAT_VERSION,
        config=config,
        int4=int4,
        int8={head: LinearFormat(*sizes[head], INT8_GROUP)},
        float16=tuple(name for name in sizes if name not in int4 and name != head),
    )


def descriptions_of(path: Path, group_size: int) -> dict[str, Description]:
    """What a model can be served as, by name: as it is stored, if its weights are there, and quantised where they are
    in floating point. Of a Hugging Face directory `config.json` suffices. Reads no weights. Raises CheckpointError.
    """
    kind = kind_of(path)
    if kind is Kind.NATIVE:
        return {"as stored": read_description(path)}
    has_weights = kind is Kind.GGUF or any(path.glob("*.safetensors"))
    stored = describe(open_source(path) if has_weights else ConfiguredSource(path))
    if stored.int4 or stored.int8:
        return {"as stored": stored}
    return {
        "fp16": native_description(stored.config, None),
        f"int4 g{group_size}": native_description(stored.config, group_size),
    }


def weight_bytes(description: Description) -> int:
    """On the device: every tensor of the checkpoint."""
    return sum(_num_bytes(spec) for spec in tensor_specs(description).values())


def estimate(
    description: Description,
    kv_dtype: KVDtype,
    total_bytes: int,
    *,
    utilization: float = 0.9,
    max_num_sequences: int = 256,
    max_num_batched_tokens: int = 2048,
    max_verified: int = MAX_VERIFIED_TOKENS,
) -> MemoryEstimate:
    """utilization: the share of the memory that may be used; the limits are those of a CUDA worker by default.
    max_verified: 0 without drafts."""
    config = description.config
    weights = weight_bytes(description)
    buffers = _buffer_bytes(config, max_num_sequences, max_num_batched_tokens, max_verified)
    buffers += COUNTER_BYTES if description.has_kv_channels else 0
    reserve = DRIVER_BYTES + SLACK_BYTES + _workspace_bytes(config, max_num_sequences, max_num_batched_tokens)
    block_bytes = config.num_layers * description.kv_layout(kv_dtype).block_bytes
    left_bytes = int(total_bytes * utilization) - weights - buffers - reserve
    most = max_num_sequences * num_blocks_for(config.max_context_tokens)
    num_blocks = min(left_bytes // block_bytes - IDLE_BLOCKS, most)
    return MemoryEstimate(
        total_bytes=total_bytes,
        weight_bytes=weights,
        buffer_bytes=buffers,
        reserve_bytes=reserve,
        kv_token_bytes=block_bytes / BLOCK_SIZE,
        kv_cache_bytes=max(num_blocks + IDLE_BLOCKS, 0) * block_bytes,
        num_tokens=num_blocks * BLOCK_SIZE,
    )


def _buffer_bytes(config: ModelConfig, max_sequences: int, max_tokens: int, max_verified: int) -> int:
    """Of `ModelRunner` and `Adjustments`."""
    inputs = max_input_bytes(max_sequences, max_tokens, max_verified, num_blocks_for(config.max_context_tokens))
    max_samples = max_sequences + max_verified
    words = max_samples * (1 + LOGPROB_WORDS + mask_words(config.vocab_size))
    words += max_tokens * LOGPROB_WORDS + max_sequences * SlotLayout(config.vocab_size).num_words
    rope_bytes = config.max_context_tokens * config.head_dim * 4
    return 2 * inputs + 4 * words + rope_bytes


def _workspace_bytes(config: ModelConfig, max_sequences: int, max_tokens: int) -> int:
    """What is alive at once in the hungriest pass: activations of a layer, or the logits of all sequences."""
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    layer = max_tokens * 2 * (hidden + max(config.qkv_features + q, 3 * config.intermediate_size))
    logits = 2 * 4 * max_sequences * config.vocab_size
    return max_tokens * 4 * hidden + max(layer, logits) + SCRATCH_BYTES


def _num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _ITEM_BYTES[spec.dtype]
