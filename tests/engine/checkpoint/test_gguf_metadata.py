from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import TinyGGUF, write_tiny_gguf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nibble.engine.checkpoint.errors import CheckpointError, GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf_source import GGUFSource
from nibble.engine.model_config import ModelConfig, RopeConfig
from nibble.engine.rope import inverse_frequencies

Edit = Callable[[gguf.GGUFWriter], None]


def edited(edit: Edit, tmp_path: Path, **spec: Any) -> ModelConfig:
    return GGUFSource(write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(**spec, edit=edit))).config


def set_key(key: str, value: Any, kind: gguf.GGUFValueType = gguf.GGUFValueType.UINT32) -> Edit:
    """Add a key, or replace one that the writer has."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    return edit


def drop_key(key: str) -> Edit:
    return lambda writer: writer.kv_data[0].pop(key)


def drop_tensor(name: str) -> Edit:
    return lambda writer: writer.tensors[0].pop(name)


FLOAT, STRING, BOOL = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL
DOUBLE = gguf.GGUFValueType.FLOAT64


def yarn(key: str, value: float) -> Edit:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        set_key(f"llama.rope.scaling.{key}", value, DOUBLE)(writer)

    return edit


def huge_heads(writer: gguf.GGUFWriter) -> None:
    yarn("yarn_beta_slow", 1.0)(writer)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        set_key(f"llama.{key}", (1 << 31) - 2)(writer)


def test_every_number_of_the_model_is_read(tmp_path: Path) -> None:
    edit = set_key("llama.rope.freq_base", 5e5, FLOAT)
    config = edited(edit, tmp_path, num_heads=6, num_kv_heads=3, tied=False, rope_freqs=True)
    divisors = tuple(np.linspace(1, 8, 16, dtype=np.float32).tolist())
    assert config == ModelConfig(
        architecture="llama", vocab_size=config.vocab_size, hidden_size=64, intermediate_size=96, num_layers=2,
        num_heads=6, num_kv_heads=3, head_dim=32, max_context_tokens=256, rms_norm_eps=float(np.float32(1e-5)),
        rope=RopeConfig(theta=5e5, frequency_divisors=divisors), tie_word_embeddings=False, attention_bias=False,
        bos_token_id=0, eos_token_ids=(1, 3),
    )  # fmt: skip


def test_absent_numbers_have_the_formats_defaults(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"):
            del writer.kv_data[0][f"llama.{key}"]
        del writer.kv_data[0]["llama.attention.head_count_kv"]
        del writer.kv_data[0]["tokenizer.ggml.bos_token_id"]

    config = edited(edit, tmp_path, num_heads=2, num_kv_heads=2)
    assert (config.head_dim, config.num_kv_heads, config.rope, config.bos_token_id) == (32, 2, RopeConfig(), None)


def test_linear_scaling_is_read_under_both_of_its_names(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    assert edited(edit, tmp_path).rope.linear_factor == 4.0
    assert edited(set_key("llama.rope.scale_linear", 2.0, FLOAT), tmp_path).rope.linear_factor == 2.0


def test_yarn_gives_the_rotation_that_transformers_computes(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    config = edited(edit, tmp_path)
    assert config.max_context_tokens == 256
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    theirs = LlamaConfig(head_dim=32, max_position_embeddings=256, rope_parameters=parameters)
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    np.testing.assert_allclose(inverse_frequencies(config), frequencies.numpy(), rtol=1e-6)
    assert config.rope.attention_factor == pytest.approx(attention_factor)


def test_every_end_of_turn_token_ends_a_generation_once(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(3)
        writer.add_eom_token_id(2)

    assert edited(edit, tmp_path).eos_token_ids == (1, 3, 2)


def test_keys_for_absent_features_are_accepted(tmp_path: Path) -> None:
    assert edited(set_key("llama.expert_count", 0), tmp_path) == edited(lambda writer: None, tmp_path)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (set_key("general.architecture", "gemma3", STRING), UnsupportedModelError, "architecture 'gemma3' is not"),
        (drop_key("general.architecture"), UnsupportedModelError, "architecture None is not supported"),
        (set_key("llama.expert_count", 8), UnsupportedModelError, "llama.expert_count is not supported (got 8)"),
        (set_key("llama.attention.sliding_window", 4096), UnsupportedModelError, "llama.attention.sliding_window"),
        (set_key("llama.logit_scale", 2.0, FLOAT), UnsupportedModelError, "model option llama.logit_scale is not"),
        (set_key("llama.attention.causal", False, BOOL), UnsupportedModelError, "llama.attention.causal is not supp"),
        (set_key("llama.rope.scaling.type", "yarn", STRING), GGUFError, "llama.rope.scaling.factor is missing"),
        (set_key("llama.rope.scaling.type", "linear", STRING), GGUFError, "llama.rope.scaling.factor is missing"),
        (set_key("llama.rope.dimension_count", 16), UnsupportedModelError, "rope.dimension_count is 16, but only the"),
        (set_key("llama.attention.value_length", 64), UnsupportedModelError, "attention.value_length is 64"),
        (drop_key("llama.block_count"), GGUFError, "metadata key llama.block_count is missing"),
        (drop_key("llama.attention.layer_norm_rms_epsilon"), GGUFError, "layer_norm_rms_epsilon is missing"),
        (drop_key("tokenizer.ggml.tokens"), GGUFError, "tokenizer.ggml.tokens is missing"),
        (set_key("llama.context_length", "long", STRING), GGUFError, "context_length is 'long', expected one integer"),
        (set_key("llama.context_length", 0), GGUFError, "llama.context_length is 0, expected a positive number"),
        (set_key("llama.block_count", 3), GGUFError, "tensor blk.2.attn_norm.weight is missing"),
        (set_key("llama.block_count", (1 << 31) - 1), GGUFError, "num_layers is 2147483647, expected 1 to 16384"),
        (set_key("llama.block_count", 1), UnsupportedModelError, "tensor blk.1.attn_norm.weight belongs to a feature"),
        (set_key("llama.attention.head_count_kv", 3), GGUFError, "num_heads 4 is not a multiple of num_kv_heads 3"),
        (set_key("llama.attention.head_count", 8), GGUFError, "blk.0.attn_q.weight has shape [128, 64], expected [256"),
        (set_key("llama.embedding_length", 96), GGUFError, "tensor token_embd.weight has shape"),
        (set_key("llama.rope.freq_base", float("nan"), FLOAT), GGUFError, "rope has the number nan"),
        (set_key("tokenizer.ggml.eos_token_id", 9999), GGUFError, "special token id 9999 is not in the vocabulary"),
        (set_key("llama.rope.freq_base", 1e-320, DOUBLE), GGUFError, "rope has the number 1e-320, expected"),
        (yarn("yarn_beta_fast", 1e-310), GGUFError, "rope.scaling.yarn_beta_fast is 1e-310, expected a positive"),
        (huge_heads, GGUFError, "head_dim 2147483646 is not a multiple of 32 up to 256"),
        (set_key("split.count", 3), UnsupportedModelError, "is one of 3 files; join them first"),
        (drop_tensor("blk.1.ffn_up.weight"), GGUFError, "tensor blk.1.ffn_up.weight is missing"),
        (drop_tensor("output_norm.weight"), GGUFError, "tensor output_norm.weight is missing"),
    ],
)
def test_what_nibble_does_not_run_is_refused_by_name(
    tmp_path: Path, edit: Edit, error: type[CheckpointError], message: str
) -> None:
    with pytest.raises(error) as caught:
        edited(edit, tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith("tiny.gguf: ")
