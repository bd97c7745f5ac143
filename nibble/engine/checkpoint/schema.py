"""Which tensors a native checkpoint holds, with their dtypes and shapes: a pure function of its description.

Writer and reader both check against this. Symbols: H hidden size, I intermediate size, V vocabulary.

    embedding                int8 or float16 linear (V, H)
    layers.{i}.attention_norm, layers.{i}.mlp_norm, final_norm    float32 (H,)
    layers.{i}.qkv           linear (all q heads, k heads, v heads; H), rows of q and k in rotate-half order
    layers.{i}.qkv.bias      float32, where the model has attention biases
    layers.{i}.q_norm, layers.{i}.k_norm    float32 (head_dim,), where the model normalises the heads of q and k
    layers.{i}.kv_channels   float32 (num_kv_heads, 2, 2, head_dim), scales and zeros of int8-channel KV blocks
                             (`kernels/layout.py`), where keys and values were calibrated
    layers.{i}.o             linear (H, num_heads * head_dim)
    layers.{i}.gate_up       linear (2 I, H), rows interleaved as `kernels/layout.py` says
    layers.{i}.down          linear (H, I)
    lm_head                  int8 or float16 linear (V, H), absent where it is the embedding (tied)

An INT4 linear is one uint8 tensor of that name in the tiles of `kernels/layout.py`; an INT8 linear (N, K) is
`name.values` int8 (N, K) and `name.scales` float16 (N, K / group_size); a float16 linear is one float16 tensor (N, K).
The description says which is which. A linear whose columns are in another order than its inputs has `name.order` int32
(K,) beside it: its column j is for input order[j].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from nibble.engine.checkpoint.errors import NativeFormatError
from nibble.engine.model_config import ModelConfig
from nibble.kernels.layout import GATE_UP_INTERLEAVE, GROUP_SIZES, KVDtype, KVLayout, int4_num_bytes

HEAD_DIM_STEP, MAX_HEAD_DIM = 32, 256  # what attention kernels may have; a backend may have fewer
MAX_LAYERS = 1 << 14  # a sane bound, a hundred times what models have: tensors are listed layer by layer
_ROPE_NUMBERS = (1e-18, 1e18)  # a sane bound, within which no power or quotient of them overflows
FORMAT_VERSION = 1  # part of the conversion cache's key: raise it whenever a file written before would be read wrongly


class LinearFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The size of one quantised matrix and of its groups along in_features."""

    out_features: int
    in_features: int
    group_size: int


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The `nibble` entry of the file's metadata."""

    format_version: int
    config: ModelConfig
    int4: dict[str, LinearFormat]
    int8: dict[str, LinearFormat]
    float16: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()  # linears whose columns are in an order of their own
    has_kv_channels: bool = False

    def kv_layout(self, dtype: KVDtype) -> KVLayout:
        """Of a KV cache of this type; INT8 is by channel where the channels are known."""
        if dtype is KVDtype.INT8 and self.has_kv_channels:
            dtype = KVDtype.INT8_CHANNEL
        return KVLayout(self.config.num_kv_heads, self.config.head_dim, dtype)


@dataclass(frozen=True)
class TensorSpec:
    """`dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]


def linear_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear, in the order of the forward pass."""
    sizes = {"embedding": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        sizes[f"layers.{i}.qkv"] = (config.qkv_features, config.hidden_size)
        sizes[f"layers.{i}.o"] = (config.hidden_size, config.num_heads * config.head_dim)
        sizes[f"layers.{i}.gate_up"] = (2 * config.intermediate_size, config.hidden_size)
        sizes[f"layers.{i}.down"] = (config.hidden_size, config.intermediate_size)
    if not config.tie_word_embeddings:
        sizes["lm_head"] = (config.vocab_size, config.hidden_size)
    return sizes


def tensor_specs(description: Description) -> dict[str, TensorSpec]:
    """Every tensor of the checkpoint. Raises NativeFormatError where the description contradicts itself."""
    problem = config_problem(description.config)
    if problem:
        raise NativeFormatError(f"configuration: {problem}")
    _check_linears(description)
    return dict(_specs(description))


def config_problem(config: ModelConfig) -> str | None:
    """Why no model can have this configuration, or None."""
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*counts, "max_context_tokens"):
        limit = MAX_LAYERS if name == "num_layers" else (1 << 31) - 1
        if not 0 < getattr(config, name) <= limit:
            return f"{name} is {getattr(config, name)}, expected 1 to {limit}"
    if config.num_heads % config.num_kv_heads:
        return f"num_heads {config.num_heads} is not a multiple of num_kv_heads {config.num_kv_heads}"
    if head_dim_problem(config.head_dim):
        return head_dim_problem(config.head_dim)
    if config.sliding_window is not None and config.sliding_window < 1:
        return f"sliding_window is {config.sliding_window}"
    if config.intermediate_size % GATE_UP_INTERLEAVE:
        return f"intermediate_size {config.intermediate_size} is not a multiple of {GATE_UP_INTERLEAVE}"
    if not 0 < config.rms_norm_eps < 1:
        return f"rms_norm_eps is {config.rms_norm_eps}"
    for token_id in (*config.eos_token_ids, config.bos_token_id or 0):
        if not 0 <= token_id < config.vocab_size:
            return f"special token id {token_id} is not in the vocabulary of {config.vocab_size}"
    return _rope_problem(config)


def head_dim_problem(head_dim: int) -> str | None:
    """Part of `config_problem`, for those who compute with it before there is a configuration."""
    if head_dim < 1 or head_dim % HEAD_DIM_STEP or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is not a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
    return None


def _rope_problem(config: ModelConfig) -> str | None:
    divisors = config.rope.frequency_divisors
    if divisors is not None and len(divisors) != config.head_dim // 2:
        return f"{len(divisors)} rope frequency divisors, expected {config.head_dim // 2}"
    for number in (config.rope.theta, config.rope.linear_factor, config.rope.attention_factor, *(divisors or ())):
        if not _ROPE_NUMBERS[0] < number < _ROPE_NUMBERS[1]:
            return f"rope has the number {number}, expected finite positive ones"
    return None


def _check_linears(description: Description) -> None:
    config = description.config
    num_linears = 4 * config.num_layers + (1 if config.tie_word_embeddings else 2)
    described = (*description.int4, *description.int8, *description.float16)
    if len(described) != num_linears:  # before a hostile num_layers is unrolled
        raise NativeFormatError(
            f"{len(described)} linears are described, expected {num_linears} for {config.num_layers} layers"
        )
    sizes = linear_sizes(config)
    seen: set[str] = set()
    for name in described:
        if name not in sizes:
            raise NativeFormatError(f"{name}: the model has no such linear")
        if name in seen:
            raise NativeFormatError(f"{name}: described twice")
        seen.add(name)
    float16 = set(description.float16)
    for name in description.ordered:
        if name not in seen or name in ("embedding", "lm_head"):
            raise NativeFormatError(f"{name}: no such linear can have an order")
    for name, size in sizes.items():
        if name not in float16:
            _check_quantized(name, size, description)


def _check_quantized(name: str, size: tuple[int, int], description: Description) -> None:
    linear = description.int4.get(name) or description.int8[name]
    if (linear.out_features, linear.in_features) != size:
        raise NativeFormatError(
            f"{name}: is {linear.out_features} x {linear.in_features}, expected {size[0]} x {size[1]}"
        )
    if name in description.int4:
        _check_int4(name, linear)
    elif linear.group_size < 1 or linear.in_features % linear.group_size:
        raise NativeFormatError(f"{name}: group size {linear.group_size} does not divide {linear.in_features}")


def _check_int4(name: str, linear: LinearFormat) -> None:
    if name in ("embedding", "lm_head"):
        raise NativeFormatError(f"{name}: must be INT8 or float16")
    if linear.group_size not in GROUP_SIZES or linear.in_features % linear.group_size:
        raise NativeFormatError(
            f"{name}: INT4 group size {linear.group_size}, expected one of {GROUP_SIZES} that divides "
            f"{linear.in_features}"
        )


def _specs(description: Description) -> Iterator[tuple[str, TensorSpec]]:
    config = description.config
    norm = TensorSpec("F32", (config.hidden_size,))
    ordered = set(description.ordered)
    for name, size in linear_sizes(config).items():
        prefix, _, stem = name.rpartition(".")
        if stem == "qkv":
            yield f"{prefix}.attention_norm", norm
        if stem == "gate_up":
            yield f"{prefix}.mlp_norm", norm
        yield from _linear_specs(name, size, description)
        if name in ordered:
            yield f"{name}.order", TensorSpec("I32", size[1:])
        if stem == "qkv" and config.attention_bias:
            yield f"{name}.bias", TensorSpec("F32", (config.qkv_features,))
        if stem == "qkv" and description.has_kv_channels:
            yield f"{prefix}.kv_channels", TensorSpec("F32", description.kv_layout(KVDtype.INT8).channels_shape)
        if stem == "qkv" and config.qk_norm:
            yield f"{prefix}.q_norm", TensorSpec("F32", (config.head_dim,))
            yield f"{prefix}.k_norm", TensorSpec("F32", (config.head_dim,))
    yield "final_norm", norm


def _linear_specs(name: str, size: tuple[int, int], description: Description) -> Iterator[tuple[str, TensorSpec]]:
    linear = description.int4.get(name)
    if linear is not None:
        yield (
            name,
            TensorSpec("U8", (int4_num_bytes(linear.out_features, linear.in_features, linear.group_size),)),
        )
        return
    linear = description.int8.get(name)
    if linear is None:
        yield name, TensorSpec("F16", size)
        return
    yield f"{name}.values", TensorSpec("I8", (linear.out_features, linear.in_features))
    yield f"{name}.scales", TensorSpec("F16", (linear.out_features, linear.in_features // linear.group_size))
