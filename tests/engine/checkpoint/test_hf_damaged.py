"""Hugging Face directories that were damaged on purpose: a model or a CheckpointError, never anything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hf_models import random_hf_model, save_hf_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import gptq, save_packed_model

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError
from nibble.engine.checkpoint.source import open_source

TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A directory, and what its files are undamaged."""
    directory = tmp_path_factory.mktemp("damaged")
    model = random_hf_model("llama", **TINY)
    save_packed_model(model, directory, gptq, GPTQ_CONFIG, group_size=32, symmetric=False)
    return directory, {name: (directory / name).read_bytes() for name in (WEIGHTS, CONFIG)}


def convert(tiny: tuple[Path, dict[str, bytes]], **damaged: bytes) -> CheckpointError | None:
    directory, contents = tiny
    for name, content in (
        contents | {f"{key}.{'safetensors' if key == 'model' else 'json'}": value for key, value in damaged.items()}
    ).items():
        (directory / name).write_bytes(content)
    out = directory / "native"
    out.mkdir(exist_ok=True)
    try:
        convert_checkpoint(open_source(directory), out, lambda stage, done: None)
    except CheckpointError as error:
        return error
    return None


def test_undamaged_it_is_a_model(tiny: tuple[Path, dict[str, bytes]]) -> None:
    assert convert(tiny) is None


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_flipped_bytes_of_the_header_and_groups(
    tiny: tuple[Path, dict[str, bytes]], flips: list[tuple[float, int]]
) -> None:
    content = bytearray(tiny[1][WEIGHTS])
    (header_bytes,) = struct.unpack_from("<Q", content)
    for place, value in flips:
        content[int(place * (8 + header_bytes))] = value
    error = convert(tiny, model=bytes(content))
    assert error is None or "damaged" in str(error) or WEIGHTS in str(error)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), tail=st.binary(max_size=40))
def test_truncated_weights(tiny: tuple[Path, dict[str, bytes]], share: float, tail: bytes) -> None:
    content = tiny[1][WEIGHTS]
    assert isinstance(convert(tiny, model=content[: int(share * (len(content) - 40))] + tail), CheckpointError)


_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.integers(-2, 300))
_VALUES = st.one_of(
    st.none(), st.booleans(), _NUMBERS, st.text(max_size=5), st.lists(_NUMBERS, max_size=3), st.just({})
)


_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast")


@settings(max_examples=150, deadline=None)
@given(
    place=st.sampled_from(["", "quantization_config", "rope_parameters"]),
    rope_type=st.sampled_from(["linear", "dynamic", "llama3", "yarn", "default"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), _VALUES), min_size=1, max_size=4),
)
def test_other_values_in_the_configuration(
    tiny: tuple[Path, dict[str, bytes]], place: str, rope_type: str, edits: list[tuple[float, Any]]
) -> None:
    config = json.loads(tiny[1][CONFIG])
    config["rope_parameters"]["rope_type"] = rope_type
    section = config[place] if place else config
    keys = sorted({*section, *_ROPE_KEYS})
    for share, value in edits:
        section[keys[int(share * len(keys))]] = value
    convert(tiny, config=json.dumps(config).encode())


@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_flipped_bytes_of_the_configuration(
    tiny: tuple[Path, dict[str, bytes]], flips: list[tuple[float, int]]
) -> None:
    content = bytearray(tiny[1][CONFIG])
    for place, value in flips:
        content[int(place * len(content))] = value
    convert(tiny, config=bytes(content))


def test_deep_nesting_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    save_hf_model(random_hf_model("llama", **TINY), tmp_path)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b"{}"
        (tmp_path / name).write_text('{"a": ' + "[" * 100_000)
        (tmp_path / "native").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=f"{name}: is not a JSON object"):
            convert_checkpoint(open_source(tmp_path), tmp_path / "native", lambda stage, done: None)
        (tmp_path / name).write_bytes(before)
