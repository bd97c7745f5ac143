"""A GGUF file of architecture `llama` (Llama 2 and 3, Mistral, TinyLlama, SmolLM2 ...) as a ModelConfig.

A key that changes the computation and that Nibble does not know is refused by name: a model that runs and answers
slightly wrong is worse than one that does not start. So is every unknown tensor.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp, src/llama-arch.cpp.
"""

from __future__ import annotations

from nibble.engine.checkpoint.errors import GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.metadata import Metadata
from nibble.engine.checkpoint.schema import config_problem
from nibble.engine.model_config import ModelConfig, RopeConfig

ARCHITECTURE = "llama"

# Suffixes of `llama.` keys that are read below.
_READ_KEYS = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
    }
)
# Keys that say nothing about the computation, or nothing without a scaling type that is refused anyway.
_IRRELEVANT_KEYS = frozenset({"tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"})
# Features that are absent where the number is 0.
_ZERO_KEYS = frozenset({"expert_count", "expert_used_count", "attention.sliding_window"})

# End-of-turn tokens that chat models generate without naming them as the end-of-sequence token.
_END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_turn>",
    }
)
_ADDED_TOKEN_TYPES = (3, 4)  # control, user-defined

LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def read_config(file: GGUFFile) -> ModelConfig:
    """Raises GGUFError for what is missing or contradictory, UnsupportedModelError for what Nibble does not run."""
    metadata, source = file.metadata, file.path.name
    architecture = metadata.string("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedModelError(f"{source}: architecture {architecture!r} is not supported, only {ARCHITECTURE!r}")
    _refuse_unknown_keys(metadata, source)
    num_heads = _count(metadata, "attention.head_count")
    hidden_size = _count(metadata, "embedding_length")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if tokens is None:
        raise metadata.required("tokenizer.ggml.tokens")
    epsilon = metadata.number("llama.attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise metadata.required("llama.attention.layer_norm_rms_epsilon")
    head_dim = _head_dim(metadata, hidden_size, num_heads, source)
    config = ModelConfig(
        architecture=ARCHITECTURE,
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=_count(metadata, "feed_forward_length"),
        num_layers=_count(metadata, "block_count"),
        num_heads=num_heads,
        num_kv_heads=_count(metadata, "attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        max_context_tokens=_count(metadata, "context_length"),
        rms_norm_eps=epsilon,
        rope=_rope(file),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(metadata, tokens),
    )
    problem = config_problem(config)
    if problem:
        raise GGUFError(f"{source}: {problem}")
    _check_tensors(file, config)
    return config


def _refuse_unknown_keys(metadata: Metadata, source: str) -> None:
    for key in metadata:
        architecture, _, suffix = key.partition(".")
        if architecture != ARCHITECTURE or suffix in _READ_KEYS or suffix in _IRRELEVANT_KEYS:
            continue
        if suffix not in _ZERO_KEYS or metadata.integer(key) != 0:
            raise UnsupportedModelError(f"{source}: the model option {key} is not supported (got {metadata[key]!r})")


def _count(metadata: Metadata, suffix: str, default: int | None = None) -> int:
    key = f"{ARCHITECTURE}.{suffix}"
    value = metadata.integer(key)
    if value is None:
        if default is None:
            raise metadata.required(key)
        return default
    if not 0 < value < 1 << 31:
        raise metadata.out_of_range(key, "a positive number below 2^31")
    return value


def _head_dim(metadata: Metadata, hidden_size: int, num_heads: int, source: str) -> int:
    head_dim = _count(metadata, "attention.key_length", default=hidden_size // num_heads)
    for suffix in ("attention.value_length", "rope.dimension_count"):
        found = _count(metadata, suffix, default=head_dim)
        if found != head_dim:
            raise UnsupportedModelError(
                f"{source}: {ARCHITECTURE}.{suffix} is {found}, but only the head dimension ({head_dim}) is supported"
            )
    return head_dim


def _rope(file: GGUFFile) -> RopeConfig:
    metadata = file.metadata
    scaling = metadata.string("llama.rope.scaling.type") or "none"
    factor = metadata.number("llama.rope.scaling.factor")
    if scaling == "linear" and factor is None:
        raise metadata.required("llama.rope.scaling.factor")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(f"{file.path.name}: llama.rope.scaling.type {scaling!r} is not supported")
    if scaling == "none":
        factor = metadata.number("llama.rope.scale_linear")  # what older writers call it
    divisors = None
    if "rope_freqs.weight" in file.tensors:
        divisors = tuple(file.dequantized("rope_freqs.weight").reshape(-1).tolist())
    theta = metadata.number("llama.rope.freq_base")
    return RopeConfig(
        theta=10000.0 if theta is None else theta,
        frequency_divisors=divisors,
        linear_factor=1.0 if factor is None else factor,
    )


def _eos_token_ids(metadata: Metadata, tokens: list[str]) -> tuple[int, ...]:
    """The end-of-sequence id first, then the end-of-turn ids that the file names or that chat models are known for."""
    ids = [metadata.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    types = metadata.numbers("tokenizer.ggml.token_type")
    if types is not None and types.shape == (len(tokens),):
        added = [i for i, kind in enumerate(types.tolist()) if kind in _ADDED_TOKEN_TYPES]
        ids += [i for i in added if tokens[i] in _END_TOKENS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """Raise unless the file holds exactly the tensors of such a model, in the right shapes."""
    expected = _expected_shapes(file, config)
    for name, shape in expected.items():
        found = file.tensor(name).shape
        if found != shape:
            raise GGUFError(f"{file.path.name}: tensor {name} has shape {list(found)}, expected {list(shape)}")
    for name in file.tensors:
        if name not in expected:
            raise UnsupportedModelError(f"{file.path.name}: tensor {name} belongs to a feature that is not supported")


def _expected_shapes(file: GGUFFile, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears: list[tuple[int, ...]] = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    linears += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, hidden)}
    shapes["output_norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    if config.rope.frequency_divisors is not None:
        shapes["rope_freqs.weight"] = (config.head_dim // 2,)
    for i in range(config.num_layers):
        shapes[f"blk.{i}.attn_norm.weight"] = shapes[f"blk.{i}.ffn_norm.weight"] = (hidden,)
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in zip(LINEARS, linears, strict=True)}
        if config.attention_bias:
            shapes |= {f"blk.{i}.{name}.bias": shape[:1] for name, shape in zip(LINEARS[:3], linears, strict=False)}
        if f"blk.{i}.attn_norm.weight" not in file.tensors:
            break  # reported as missing; a hostile number of layers is not unrolled
    return shapes
