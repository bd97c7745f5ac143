"""Hugging Face directories against what `transformers` itself has in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from architectures import LLAMA3, YARN
from hf_models import random_hf_model, save_hf_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from nibble.engine.checkpoint.errors import CheckpointError, ConversionError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.source import floating_tensors, open_source
from nibble.engine.rope import inverse_frequencies


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}], ids=["one file", "shards"])
def test_every_tensor_has_the_numbers_of_the_model(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    model = random_hf_model("qwen2")
    save_hf_model(model, tmp_path, dtype, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    state = {name: tensor.to(getattr(torch, dtype)).float().numpy() for name, tensor in model.state_dict().items()}
    ours = dict(floating_tensors(open_source(tmp_path)))
    assert set(ours) == set(state)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, state[name], err_msg=name)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_scaling_may_be_stated_under_its_old_and_its_new_name(tmp_path: Path, kind: str) -> None:
    model = random_hf_model("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4})
    save_hf_model(model, tmp_path)
    both = open_source(tmp_path).config
    set_option(rope_scaling={kind: "linear", "factor": 4.0})(tmp_path)
    assert open_source(tmp_path).config == both
    set_option(rope_parameters=None, rope_theta=5e4)(tmp_path)
    assert open_source(tmp_path).config == both
    assert (both.rope.linear_factor, both.rope.theta) == (4.0, 5e4)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    save_hf_model(random_hf_model("llama", tie_word_embeddings=True), tmp_path)
    embedding = "model.embed_tokens.weight"
    edit_tensors(lambda t: t.update({"lm_head.weight": t[embedding].float().clone()}))(tmp_path)
    assert set(dict(floating_tensors(open_source(tmp_path)))) >= {embedding}


def test_a_head_dimension_that_is_left_out_is_the_architectures(tmp_path: Path) -> None:
    save_hf_model(random_hf_model("qwen3", head_dim=128), tmp_path)
    edit_json("config.json", lambda config: config.pop("head_dim"))(tmp_path)
    assert open_source(tmp_path).config.head_dim == AutoConfig.from_pretrained(tmp_path).head_dim == 128


def test_some_rows_of_a_matrix_can_be_read(tmp_path: Path) -> None:
    model = random_hf_model("llama")
    source = open_source(save_hf_model(model, tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(source.floats(name, slice(3, 5)), model.state_dict()[name][3:5].numpy())


@pytest.mark.parametrize(
    ("model_type", "options", "window"),
    [
        ("mistral", {"sliding_window": 33}, 33),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 33}, None),
        ("qwen2", {"sliding_window": 33, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("qwen3", {"sliding_window": 33, "use_sliding_window": True, "max_window_layers": 0}, 33),
    ],
)
def test_a_window_is_there_where_the_architecture_uses_it(
    tmp_path: Path, model_type: str, options: dict[str, Any], window: int | None
) -> None:
    config = open_source(save_hf_model(random_hf_model(model_type, **options), tmp_path)).config
    assert config.sliding_window == window


@pytest.mark.parametrize(
    ("model_type", "kinds", "window"),
    [
        ("mistral", ["full_attention"] * 2, None),
        ("mistral", ["sliding_attention"] * 2, 33),
        ("qwen3", ["sliding_attention"] * 2, 33),
        ("qwen3", ["full_attention"] * 2, None),
        ("llama", ["sliding_attention"] * 2, None),  # which has none, whatever its configuration says
    ],
)
def test_kinds_of_layers_overrule_the_window(
    tmp_path: Path, model_type: str, kinds: list[str], window: int | None
) -> None:
    save_hf_model(random_hf_model(model_type), tmp_path)
    set_option(sliding_window=33, use_sliding_window=True, layer_types=kinds)(tmp_path)
    assert open_source(tmp_path).config.sliding_window == window


@pytest.mark.parametrize("scaling", [YARN, {"rope_type": "llama3", **LLAMA3}])
def test_trained_tokens_beside_the_scaling_are_believed(tmp_path: Path, scaling: dict[str, Any]) -> None:
    save_hf_model(random_hf_model("llama", rope_parameters={"rope_theta": 1e4, **scaling}), tmp_path)
    inside = open_source(tmp_path).config
    set_option(original_max_position_embeddings=32)(tmp_path)
    ours = open_source(tmp_path).config
    assert ours.rope != inside.rope
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(ours), theirs, rtol=1e-5)


def test_a_window_that_is_left_out_is_the_architectures(tmp_path: Path) -> None:
    save_hf_model(random_hf_model("mistral"), tmp_path)
    edit_json("config.json", lambda config: config.pop("sliding_window"))(tmp_path)
    assert open_source(tmp_path).config.sliding_window == AutoConfig.from_pretrained(tmp_path).sliding_window == 4096


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_tokenizer_and_chat_template_go_along(tmp_path: Path, place: str) -> None:
    source, native = tmp_path / "source", tmp_path / "native"
    native.mkdir()
    save_hf_model(random_hf_model("llama"), source)
    template = "{% for m in messages %}«{{ m.content }}»{% endfor %}"
    if place.endswith("jinja"):
        (source / place).write_text(template, encoding="utf-8")
    else:
        edit_json(place, lambda values: values.update(chat_template=template), create=True)(source)
    open_source(source).write_tokenizer(native)
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(native)
    assert ours("true {12é").input_ids == theirs("true {12é").input_ids
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "«Hi»"


def test_a_tokenizer_without_a_model_is_an_error(tmp_path: Path) -> None:
    source = open_source(save_hf_model(random_hf_model("llama"), tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json: model is missing or not an object"):
        source.write_tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    source = open_source(save_hf_model(random_hf_model("llama"), tmp_path))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(SourceError, match=r"chat_template\.jinja: is not UTF-8"):
        source.write_tokenizer(tmp_path)


def edit_json(name: str, edit: Callable[[dict[str, Any]], None], create: bool = False) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        values = {} if create and not (directory / name).exists() else json.loads((directory / name).read_text())
        edit(values)
        (directory / name).write_text(json.dumps(values))

    return apply


def set_option(**values: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config.update(values))


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        edit(tensors)
        safetensors.torch.save_file(tensors, path)

    return apply


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (set_option(model_type="gemma"), UnsupportedModelError, "model_type 'gemma' is not supported, only llama, mi"),
        (set_option(model_type=7), SourceError, "model_type is '7', expected a string"),
        (set_option(hidden_act="gelu"), UnsupportedModelError, "option hidden_act is not supported (got 'gelu')"),
        (set_option(attention_bias=True), UnsupportedModelError, "option attention_bias is not supported (got 'True')"),
        (set_option(auto_map={"AutoModel": "x.Y"}), UnsupportedModelError, "option auto_map is not supported"),
        (set_option(hidden_size=None), SourceError, "config.json: hidden_size is missing"),
        (set_option(hidden_size=-1), SourceError, "hidden_size is '-1', expected a positive number below 2^31"),
        (set_option(num_hidden_layers=3), SourceError, "tensor model.layers.2.input_layernorm.weight is missing"),
        (set_option(vocab_size=301), SourceError, "embed_tokens.weight has shape [300, 128], expected [301, 128]"),
        (set_option(head_dim=80), SourceError, "head_dim 80 is not a multiple of 32 up to 256"),
        (
            set_option(num_hidden_layers=(1 << 31) - 1),
            SourceError,
            "num_layers is 2147483647, expected 1 to 16384",
        ),
        (
            set_option(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
            UnsupportedModelError,
            "a sliding_window in some layers only is not supported",
        ),
        (set_option(is_causal=False), UnsupportedModelError, "option is_causal is not supported (got 'False')"),
        (
            set_option(model_type="mistral", layer_types=["full_attention", "sliding_attention"]),
            UnsupportedModelError,
            "a sliding_window in some layers only is not supported",
        ),
        (
            set_option(model_type="qwen3", layer_types=["sliding_attention"] * 2),
            SourceError,
            "layer_types is \"['sliding_attention', 'sliding_attention']\", expected full_attention alone",
        ),
        (
            set_option(model_type="qwen3", layer_types=["chunked_attention"] * 2),
            SourceError,
            "expected full_attention and sliding_attention alone",
        ),
        (set_option(model_type="qwen3", layer_types=["full_attention"]), SourceError, "expected a list of 2 layers"),
        (set_option(eos_token_id="x"), SourceError, "eos_token_id is 'x', expected a token id or a list of them"),
        (
            set_option(rope_parameters={"rope_type": "longrope"}),
            UnsupportedModelError,
            "rope_parameters: rope_type 'longrope' is not supported",
        ),
        (
            set_option(head_dim=(1 << 31) - 2, rope_parameters={"rope_type": "llama3", **LLAMA3}),
            SourceError,
            "head_dim 2147483646 is not a multiple of 32 up to 256",
        ),
        (
            set_option(rope_parameters={**YARN, "rope_theta": 1e4, "beta_fast": 1e-310}),
            SourceError,
            "rope_parameters: beta_fast is '1e-310', expected a positive number",
        ),
        (
            set_option(rope_scaling={"type": "linear", "factor": 4.0}),
            SourceError,
            "rope_parameters and rope_scaling contradict each other",
        ),
        (
            set_option(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
            UnsupportedModelError,
            "rope_parameters: layers with different rotations are not supported",
        ),
        (
            set_option(tie_word_embeddings=True),
            SourceError,
            "tensor lm_head.weight is not model.embed_tokens.weight, though config.json says that they are one",
        ),
        (
            set_option(rope_parameters={"rope_type": "linear"}),
            SourceError,
            "config.json: rope_parameters: factor is missing",
        ),
        (
            set_option(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            UnsupportedModelError,
            "partial_rotary_factor is not supported",
        ),
        (edit_tensors(lambda t: t.pop(DOWN)), SourceError, f"tensor {DOWN} is missing"),
        (
            edit_tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
            UnsupportedModelError,
            f"tensor {DOWN} is I8; supported are F32, F16, BF16",
        ),
        (
            edit_tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(4)})),
            UnsupportedModelError,
            "tensor model.layers.0.mlp.up_proj.bias belongs to a feature that is not supported",
        ),
        (lambda path: (path / "tokenizer.json").unlink(), SourceError, "tokenizer.json is missing"),
        (lambda path: (path / "config.json").write_text("[" * 10**5), SourceError, "is not a JSON object"),
        (
            lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
            SourceError,
            "pytorch_model.bin is a pickle, which is never opened",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], None], error: type[CheckpointError], message: str
) -> None:
    damage(save_hf_model(random_hf_model("llama"), tmp_path))
    with pytest.raises(error) as caught:
        open_source(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "nowhere.safetensors", ""])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: str) -> None:
    save_hf_model(random_hf_model("llama"), tmp_path / "model")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    index = {"weight_map": {DOWN: name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"names .*, which is not a file beside it"):
        open_source(tmp_path / "model")


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "infinite or NaN"), (7e4, "weights beyond fp16's 65504")]
)
def test_weights_that_are_no_fp16_numbers_are_refused_by_name(tmp_path: Path, value: float, message: str) -> None:
    save_hf_model(random_hf_model("llama"), tmp_path, "bfloat16")
    edit_tensors(lambda t: t[DOWN].view(-1)[5:6].fill_(value))(tmp_path)
    with pytest.raises(ConversionError, match=rf"tensor {DOWN} has .*{message}"):
        open_source(tmp_path).rows(DOWN)
