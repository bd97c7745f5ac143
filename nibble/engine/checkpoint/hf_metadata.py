"""`config.json` of a Hugging Face model as a ModelConfig: Llama, Mistral, Qwen2 and Qwen3.

An option that changes the computation and that Nibble does not have is refused by name. Keys that are not known are
passed over, as `transformers` does: for these four architectures the ones below are all that it computes by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nibble.engine.checkpoint.errors import SourceError, UnsupportedModelError
from nibble.engine.checkpoint.schema import config_problem, head_dim_problem
from nibble.engine.model_config import ARCHITECTURES, ModelConfig, RopeConfig
from nibble.engine.rope import llama3_divisors, yarn_attention_factor, yarn_divisors

# What these options have to be, where they are there: other values change what is computed.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),  # it would be one of the output projection too
    "partial_rotary_factor": (1.0,),
    "is_decoder": (True, False),
    "is_causal": (True,),
    "add_cross_attention": (False,),
    "auto_map": (None,),  # code of the model's own
}
_MAX_JSON_BYTES = 64 << 20
_QWEN3_HEAD_DIM = 128  # of a configuration that leaves it out
_FIRST_WINDOW_LAYER = 28  # of a configuration that leaves it out
_FULL, _SLIDING = "full_attention", "sliding_attention"  # layer_types
_DEFAULT_WINDOW = 4096  # of a configuration that leaves it out; null says that there is none

logger = logging.getLogger(__name__)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SourceError where it is not there or not one."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_JSON_BYTES:
        raise SourceError(f"{path}: is larger than {_MAX_JSON_BYTES} bytes")
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{path}: is not a JSON object: {error}") from None


def read_hf_config(directory: Path) -> ModelConfig:
    """Raises SourceError for what is missing or contradictory, UnsupportedModelError for what Nibble does not run."""
    path = directory / "config.json"
    keys = _Keys(read_json(path), str(path))
    architecture = keys.string("model_type")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: model_type {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    _refuse_options(keys)
    num_heads, hidden_size = keys.count("num_attention_heads"), keys.count("hidden_size")
    head_dim = keys.count(
        "head_dim", default=_QWEN3_HEAD_DIM if architecture == "qwen3" else max(1, hidden_size // num_heads)
    )
    problem = head_dim_problem(head_dim)
    if problem:
        raise SourceError(f"{path}: {problem}")
    context_tokens, rope = _read_rope(keys, head_dim)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=keys.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.count("intermediate_size"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", default=8 if architecture == "mistral" else num_heads),
        head_dim=head_dim,
        max_context_tokens=context_tokens,
        rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope=rope,
        tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        sliding_window=_sliding_window(keys, architecture),
        bos_token_id=next(iter(_token_ids(keys, "bos_token_id")), None),
        eos_token_ids=_eos_token_ids(directory, keys),
    )
    problem = config_problem(config)
    if problem:
        raise SourceError(f"{path}: {problem}")
    return config


class _Keys:
    """Typed reading of one JSON object; null is as good as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.given = frozenset(values)
        self.values = {key: value for key, value in values.items() if value is not None}
        self.source = source

    def error(self, key: str, expected: str) -> SourceError:
        if key not in self.values:
            return SourceError(f"{self.source}: {key} is missing")
        return SourceError(f"{self.source}: {key} is {str(self.values[key])[:80]!r}, expected {expected}")

    def string(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-18 < value < 1e18:
            raise self.error(key, "a positive number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.error(key, "a positive number below 2^31")
        return value

    def section(self, key: str) -> _Keys:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return _Keys(value, f"{self.source}: {key}")


def _refuse_options(keys: _Keys) -> None:
    for key, allowed in _FIXED.items():
        if key in keys.values and keys.values[key] not in allowed:
            raise UnsupportedModelError(
                f"{keys.source}: the model option {key} is not supported (got {str(keys.values[key])[:80]!r})"
            )


def _sliding_window(keys: _Keys, architecture: str) -> int | None:
    """Mistral has it in all layers, Qwen in those from max_window_layers on, if at all; layer_types overrules both."""
    if architecture == "llama":
        return None
    is_none = "sliding_window" in keys.given and "sliding_window" not in keys.values
    if is_none or (architecture != "mistral" and not keys.boolean("use_sliding_window", default=False)):
        window = None
    else:
        window = keys.count("sliding_window", default=_DEFAULT_WINDOW)
    kinds = _layer_types(keys, architecture, window is not None)
    if len(kinds) > 1:
        raise UnsupportedModelError(f"{keys.source}: a sliding_window in some layers only is not supported")
    if kinds == {_FULL}:
        return None
    if window is None:
        raise keys.error("layer_types", f"{_FULL} alone, as there is no sliding_window")
    return window


def _layer_types(keys: _Keys, architecture: str, has_window: bool) -> set[str]:
    num_layers, stated = keys.count("num_hidden_layers"), keys.values.get("layer_types")
    if stated is not None:
        if not isinstance(stated, list) or len(stated) != num_layers:
            raise keys.error("layer_types", f"a list of {num_layers} layers")
        if not all(kind in (_FULL, _SLIDING) for kind in stated):
            raise keys.error("layer_types", f"{_FULL} and {_SLIDING} alone")
        return set(stated)
    first = 0 if architecture == "mistral" else keys.values.get("max_window_layers", _FIRST_WINDOW_LAYER)
    if not isinstance(first, int):
        raise keys.error("max_window_layers", "a number of layers")
    if not has_window or first >= num_layers:
        return {_FULL}
    return {_SLIDING} if first <= 0 else {_FULL, _SLIDING}


def _read_rope(keys: _Keys, head_dim: int) -> tuple[int, RopeConfig]:
    """(the longest context, the rotation). Before `transformers` 5 the two keys had other names."""
    context_tokens = keys.count("max_position_embeddings")
    section = _rope_section(keys)
    if "original_max_position_embeddings" in keys.values:  # `transformers` believes this one rather than the section's
        section.values["original_max_position_embeddings"] = keys.values["original_max_position_embeddings"]
    if "partial_rotary_factor" in section.values and section.number("partial_rotary_factor") != 1.0:
        raise UnsupportedModelError(f"{section.source}: the model option partial_rotary_factor is not supported")
    theta = section.number("rope_theta", default=keys.number("rope_theta", default=10000.0))
    kind = section.values.get("rope_type", section.values.get("type", "default"))
    if kind == "default":
        return context_tokens, RopeConfig(theta=theta)
    if kind == "linear":
        return context_tokens, RopeConfig(theta=theta, linear_factor=section.number("factor"))
    if kind == "dynamic":
        # Frequencies change with the length of the text once it is longer than what the model was trained on. Keys in
        # the cache would not follow, so that is where the context ends.
        logger.info("config=%s rope=dynamic: the context ends at the trained %d tokens", keys.source, context_tokens)
        return context_tokens, RopeConfig(theta=theta)
    if kind == "llama3":
        return context_tokens, RopeConfig(theta=theta, frequency_divisors=_llama3(section, theta, head_dim))
    if kind == "yarn":
        return _yarn(section, theta, head_dim, context_tokens)
    raise UnsupportedModelError(f"{section.source}: rope_type {kind!r} is not supported")


def _rope_section(keys: _Keys) -> _Keys:
    """The newer of the two, unless they contradict each other: programs differ in which one they then believe."""
    new, old = keys.section("rope_parameters"), keys.section("rope_scaling")
    for section in (new, old):
        if any(isinstance(value, dict) for value in section.values.values()):
            raise UnsupportedModelError(f"{section.source}: layers with different rotations are not supported")
    if new.values and old.values and _rope_scaling(new) != _rope_scaling(old):
        raise SourceError(f"{keys.source}: rope_parameters and rope_scaling contradict each other: remove one")
    return new if new.values else old


def _rope_scaling(section: _Keys) -> dict[str, Any]:
    """Without what need not be in both, under the newer name."""
    kind = section.values.get("rope_type", section.values.get("type", "default"))
    rest = {key: value for key, value in section.values.items() if key not in ("rope_type", "type", "rope_theta")}
    return rest | {"rope_type": kind}


def _llama3(section: _Keys, theta: float, head_dim: int) -> tuple[float, ...]:
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if low >= high:
        raise section.error("low_freq_factor", "a number below high_freq_factor")
    trained_tokens = section.count("original_max_position_embeddings")
    return llama3_divisors(theta, head_dim, section.number("factor"), low, high, trained_tokens)


def _yarn(section: _Keys, theta: float, head_dim: int, context_tokens: int) -> tuple[int, RopeConfig]:
    """The context is what scaling makes of the trained one, where the file does not say more."""
    trained_tokens = section.count("original_max_position_embeddings", default=context_tokens)
    factor = section.number("factor", default=context_tokens / trained_tokens)
    if theta <= 1:
        raise section.error("rope_theta", "a number above 1")
    divisors = yarn_divisors(
        theta,
        head_dim,
        factor,
        trained_tokens,
        section.number("beta_fast", default=32.0),
        section.number("beta_slow", default=1.0),
        section.boolean("truncate", default=True),
    )
    attention_factor = yarn_attention_factor(factor)
    if section.values.get("mscale") and section.values.get("mscale_all_dim"):
        attention_factor = yarn_attention_factor(factor, section.number("mscale"))
        attention_factor /= yarn_attention_factor(factor, section.number("mscale_all_dim"))
    if "attention_factor" in section.values:
        attention_factor = section.number("attention_factor")
    rope = RopeConfig(theta=theta, frequency_divisors=divisors, attention_factor=attention_factor)
    return max(context_tokens, int(trained_tokens * factor)), rope


def _eos_token_ids(directory: Path, keys: _Keys) -> tuple[int, ...]:
    """Those of generation_config.json first, which for chat models has the end of a turn."""
    path = directory / "generation_config.json"
    generation = _Keys(read_json(path) if path.is_file() else {}, str(path))
    ids = _token_ids(generation, "eos_token_id") + _token_ids(keys, "eos_token_id")
    return tuple(dict.fromkeys(ids))


def _token_ids(keys: _Keys, key: str) -> list[int]:
    value = keys.values.get(key, [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise keys.error(key, "a token id or a list of them")
    return ids
