"""What is known of a model on the hub before it is downloaded, beside what is known of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import NOWHERE, FakeHub, point_to
from gguf_files import TinyGGUF, write_tiny_gguf
from hf_models import random_hf_model, save_hf_model
from packed_models import awq, compressed_tensors, gptq, save_packed_model

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError, SafetensorsError, UnsupportedModelError
from nibble.engine.checkpoint.source import open_source
from nibble.engine.memory_estimate import descriptions_of
from nibble.service.hub_model import HubModelError, fetch_hub_model
from nibble.service.hub_outline import model_outline

ID = Path("some/model")
# Large enough that nobody could take the weights for a header.
SIZES = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 4000}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
ASYMMETRIC = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": ASYMMETRIC}},
}


def silent(stage: str, done: float) -> None:
    pass


def floating(directory: Path, **options: Any) -> None:
    save_hf_model(random_hf_model("qwen2", **SIZES), directory, "bfloat16", **options)


def packed(directory: Path, pack: Callable[..., Any], config: dict[str, Any], **options: Any) -> None:
    model = random_hf_model("llama", **SIZES)
    save_packed_model(model, directory, pack, config, group_size=64, symmetric=False, **options)


def native(directory: Path, has_channels: bool) -> None:
    packed(directory / "source", gptq, GPTQ, reordered=True)
    channels = [np.ones((2, 2, 2, 64), np.float32)] * 2 if has_channels else None
    convert_checkpoint(open_source(directory / "source"), directory, silent, channels)


MODELS: dict[str, Callable[[Path], None]] = {
    "floating": floating,
    "shards": lambda path: floating(path, max_shard_size="2MB"),
    "awq": lambda path: packed(path, awq, {"quant_method": "awq", "bits": 4, "group_size": 64}),
    "gptq": lambda path: packed(path, gptq, {**GPTQ, "desc_act": False}),
    "gptq, act-order": lambda path: packed(path, gptq, GPTQ, reordered=True),
    "compressed-tensors": lambda path: packed(path, compressed_tensors, COMPRESSED),
    "native": lambda path: native(path, has_channels=False),
    "native, channels": lambda path: native(path, has_channels=True),
}


def publish(hub: FakeHub, directory: Path) -> int:
    """-> the size of all of it."""
    hub.files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return sum(map(len, hub.files.values()))


@pytest.mark.parametrize("name", MODELS)
def test_outline_is_described_as_the_model_is_and_weights_are_not_fetched(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    MODELS[name](tmp_path / "model")
    total_bytes = publish(hub, tmp_path / "model")
    outline = model_outline(ID, tmp_path / "outline", silent)
    assert descriptions_of(outline, 64) == descriptions_of(tmp_path / "model", 64)
    assert hub.num_bytes < 0.4 * total_bytes
    assert "tokenizer.json" not in hub.requested
    assert sum(path.stat().st_blocks * 512 for path in outline.iterdir()) < total_bytes / 2
    assert not (tmp_path / "hub").exists()  # huggingface_hub's cache: `serve` would take it for the model


@pytest.mark.parametrize(
    "spec", [TinyGGUF(), TinyGGUF(rope_freqs=True, tied=False, kinds={"token_embd.weight": "Q6_K"})]
)
def test_outline_of_a_gguf_file(hub: FakeHub, tmp_path: Path, spec: TinyGGUF) -> None:
    spec = TinyGGUF(**{**vars(spec), "hidden_size": 1024, "intermediate_size": 1024})
    path = write_tiny_gguf(tmp_path / "model-q4.gguf", spec)
    hub.files["model-q4.gguf"] = path.read_bytes()
    outline = model_outline(ID / "model-q4.gguf", tmp_path / "outline", silent)
    assert descriptions_of(outline, 128) == descriptions_of(path, 128)
    assert hub.num_bytes < 0.2 * path.stat().st_size
    assert hub.requested == ["model-q4.gguf"] * (2 if spec.rope_freqs else 1)


def test_header_that_is_long_is_read_to_its_end(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nibble.service.hub_outline._FIRST_BYTES", 500)
    path = write_tiny_gguf(tmp_path / "model-q4.gguf")
    floating(tmp_path / "model")
    publish(hub, tmp_path / "model")
    hub.files["model-q4.gguf"] = path.read_bytes()
    for name, whole in (("some/model", tmp_path / "model"), ("some/model/model-q4.gguf", path)):
        outline = model_outline(Path(name), tmp_path / f"outline-{whole.name}", silent)
        assert descriptions_of(outline, 64) == descriptions_of(whole, 64)


def test_server_that_knows_no_ranges_is_not_listened_to_for_long(hub: FakeHub, tmp_path: Path) -> None:
    hub.knows_ranges = False
    save_hf_model(random_hf_model("llama", vocab_size=40_000), tmp_path / "model", "float32")
    total_bytes = publish(hub, tmp_path / "model")
    outline = model_outline(ID, tmp_path / "outline", silent)
    assert descriptions_of(outline, 64) == descriptions_of(tmp_path / "model", 64)
    assert hub.num_bytes < total_bytes / 2


def test_what_is_here_is_its_own_outline(tmp_path: Path) -> None:
    floating(tmp_path / "model")
    assert model_outline(tmp_path / "model", tmp_path / "outline", silent) == tmp_path / "model"
    assert not (tmp_path / "outline").exists()


def test_without_a_connection_a_downloaded_model_is_its_own_outline(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    floating(tmp_path / "model")
    publish(hub, tmp_path / "model")
    directory = fetch_hub_model(ID, silent)
    point_to(NOWHERE, monkeypatch)
    assert model_outline(ID, tmp_path / "outline", silent) == directory


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda files: files.update({"config.json": b'{"model_type": "gemma"}'}),
            UnsupportedModelError,
            "model_type 'gemma'",
        ),
        (lambda files: files.update({"model.safetensors": b"12345"}), SafetensorsError, "the file has only 5 bytes"),
        (
            lambda files: files.update({"model.safetensors": b"\xff" * 20}),
            SafetensorsError,
            "does not fit the file of 20",
        ),
        (lambda files: files.pop("tokenizer.json"), CheckpointError, "tokenizer.json is missing"),
        (lambda files: files.pop("config.json"), CheckpointError, "holds no model"),
    ],
)
def test_what_could_not_be_served_is_refused_before_it_is_downloaded(
    hub: FakeHub, tmp_path: Path, edit: Callable[[dict[str, bytes]], object], error: type[Exception], message: str
) -> None:
    floating(tmp_path / "model")
    publish(hub, tmp_path / "model")
    edit(hub.files)
    outline = model_outline(ID, tmp_path / "outline", silent)
    with pytest.raises(error, match=message):
        descriptions_of(outline, 64)


@pytest.mark.parametrize(
    "fetch", [model_outline, lambda source, directory, progress: fetch_hub_model(source, progress)]
)
@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        (
            "some/model",
            {"a.gguf": b"", "b.gguf": b""},
            "has GGUF files: name one of them: some/model/a.gguf, some/model/b",
        ),
        (
            "some/model",
            {"pytorch_model.bin": b"", "config.json": b"{}"},
            "no safetensors files, and pickled weights are",
        ),
        ("some/model", {"original/model.safetensors": b""}, "no safetensors files"),
        ("some/model/c.gguf", {"a.gguf": b""}, "some/model: has no file c.gguf on the hub"),
        ("some/--model", {}, "some/--model: neither a file here nor an id on the hub"),
        ("no/model", {}, "no/model: neither a file here nor a model on the hub"),
        ("gated/model", {}, "gated/model: its owner asks for an agreement first"),
    ],
)
def test_what_has_no_weights_to_serve_is_one_line(
    hub: FakeHub, tmp_path: Path, fetch: Callable[..., Path], source: str, files: dict[str, bytes], message: str
) -> None:
    hub.files = files
    with pytest.raises(HubModelError) as caught:
        fetch(Path(source), tmp_path / "outline", silent)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plan_of_what_is_neither_here_nor_reachable_is_one_line(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(NOWHERE, monkeypatch)
    with pytest.raises(HubModelError, match="is not on this machine, and the hub cannot be reached"):
        model_outline(ID, tmp_path / "outline", silent)
