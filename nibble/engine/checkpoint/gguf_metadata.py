"""A GGUF file as a ModelConfig: architectures `llama` (Llama 2 and 3, Mistral, TinyLlama, SmolLM2), `qwen2`, `qwen3`.

A key that changes the computation and that Nibble does not know is refused by name: a model that runs and answers
slightly wrong is worse than one that does not start. So is every unknown tensor.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp, src/llama-arch.cpp.
"""

from __future__ import annotations

from nibble.engine.checkpoint.errors import GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.metadata import Metadata
from nibble.engine.checkpoint.schema import config_problem, head_dim_problem
from nibble.engine.model_config import ModelConfig, RopeConfig
from nibble.engine.rope import yarn_attention_factor, yarn_divisors

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Suffixes of the architecture's keys (`llama.context_length`) that are read below.
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
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
# Keys that say nothing about the computation.
_IRRELEVANT_KEYS = frozenset({"tensor_data_layout", "rope.scaling.finetuned"})
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

# Hugging Face's names within a layer
TENSOR_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read_config(file: GGUFFile) -> ModelConfig:
    """Raises GGUFError for what is missing or contradictory, UnsupportedModelError for what Nibble does not run."""
    metadata, source = file.metadata, file.path.name
    architecture = metadata.string("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    if (metadata.integer("split.count") or 1) > 1:
        raise UnsupportedModelError(
            f"{source}: is one of {metadata['split.count']} files; join them first: llama-gguf-split --merge"
        )
    keys = _Keys(metadata, architecture, source)
    keys.refuse_unknown()
    num_heads, hidden_size = keys.count("attention.head_count"), keys.count("embedding_length")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if tokens is None:
        raise metadata.required("tokenizer.ggml.tokens")
    head_dim = _head_dim(keys, hidden_size // num_heads)
    context_tokens, rope = _rope(file, keys, head_dim)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=keys.count("feed_forward_length"),
        num_layers=keys.count("block_count"),
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        max_context_tokens=context_tokens,
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(metadata, tokens),
    )
    problem = config_problem(config)
    if problem:
        raise GGUFError(f"{source}: {problem}")
    return config


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that has Hugging Face's."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{TENSOR_NAMES[stem]}.{kind}"


class _Keys:
    """The keys that begin with the architecture's name."""

    def __init__(self, metadata: Metadata, architecture: str, source: str) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self.source = source

    def refuse_unknown(self) -> None:
        for key in self.metadata:
            architecture, _, suffix = key.partition(".")
            if architecture != self.architecture or suffix in _READ_KEYS or suffix in _IRRELEVANT_KEYS:
                continue
            if suffix not in _ZERO_KEYS or self.metadata.integer(key) != 0:
                raise UnsupportedModelError(
                    f"{self.source}: the model option {key} is not supported (got {self.metadata[key]!r})"
                )

    def name(self, suffix: str) -> str:
        return f"{self.architecture}.{suffix}"

    def count(self, suffix: str, default: int | None = None) -> int:
        key = self.name(suffix)
        value = self.metadata.integer(key)
        if value is None:
            if default is None:
                raise self.metadata.required(key)
            return default
        if not 0 < value < 1 << 31:
            raise self.metadata.out_of_range(key, "a positive number below 2^31")
        return value

    def number(self, suffix: str, default: float | None = None) -> float:
        key = self.name(suffix)
        value = self.metadata.number(key)
        if value is None and default is None:
            raise self.metadata.required(key)
        return default if value is None else value  # type: ignore[return-value]  # one of them is there

    def positive(self, suffix: str, default: float) -> float:
        value = self.number(suffix, default)
        if not 1e-6 < value < 1e6:
            raise self.metadata.out_of_range(self.name(suffix), "a positive number")
        return value


def _head_dim(keys: _Keys, default: int) -> int:
    head_dim = keys.count("attention.key_length", default=default)
    for suffix in ("attention.value_length", "rope.dimension_count"):
        found = keys.count(suffix, default=head_dim)
        if found != head_dim:
            raise UnsupportedModelError(
                f"{keys.source}: {keys.name(suffix)} is {found}, but only the head dimension ({head_dim}) is supported"
            )
    problem = head_dim_problem(head_dim)
    if problem:
        raise GGUFError(f"{keys.source}: {problem}")
    return head_dim


def _rope(file: GGUFFile, keys: _Keys, head_dim: int) -> tuple[int, RopeConfig]:
    """(the longest context, the rotation)"""
    scaling = keys.metadata.string(keys.name("rope.scaling.type")) or "none"
    theta, context_tokens = keys.number("rope.freq_base", default=10000.0), keys.count("context_length")
    divisors = None
    if "rope_freqs.weight" in file.tensors:
        divisors = tuple(file.dequantized("rope_freqs.weight").reshape(-1).tolist())
    if scaling == "none":
        factor = keys.number("rope.scale_linear", default=1.0)  # what older writers call it
        return context_tokens, RopeConfig(theta=theta, frequency_divisors=divisors, linear_factor=factor)
    factor = keys.number("rope.scaling.factor")
    if scaling == "linear":
        return context_tokens, RopeConfig(theta=theta, frequency_divisors=divisors, linear_factor=factor)
    if scaling != "yarn" or divisors is not None:
        raise UnsupportedModelError(f"{keys.source}: {keys.name('rope.scaling.type')} {scaling!r} is not supported")
    if not (theta > 1 and 0 < factor < 1e6):
        raise GGUFError(f"{keys.source}: rope of type 'yarn' has theta {theta} and factor {factor}")
    trained_tokens = keys.count("rope.scaling.original_context_length", default=context_tokens)
    rope = RopeConfig(
        theta=theta,
        frequency_divisors=yarn_divisors(
            theta,
            head_dim,
            factor,
            trained_tokens,
            keys.positive("rope.scaling.yarn_beta_fast", default=32.0),
            keys.positive("rope.scaling.yarn_beta_slow", default=1.0),
        ),
        attention_factor=yarn_attention_factor(factor),
    )
    return max(context_tokens, int(trained_tokens * factor)), rope


def _eos_token_ids(metadata: Metadata, tokens: list[str]) -> tuple[int, ...]:
    """The end-of-sequence id first, then the end-of-turn ids that the file names or that chat models are known for."""
    ids = [metadata.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    types = metadata.numbers("tokenizer.ggml.token_type")
    if types is not None and types.shape == (len(tokens),):
        added = [i for i, kind in enumerate(types.tolist()) if kind in _ADDED_TOKEN_TYPES]
        ids += [i for i in added if tokens[i] in _END_TOKENS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
