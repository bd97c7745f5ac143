"""`prepare_model`: the link that a gateway and workers of other containers are started on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf_files import TinyGGUF, write_tiny_gguf
from rich.console import Console

from nibble.engine.checkpoint.native import load_checkpoint
from nibble.service.launcher.errors import ModelNotFound
from nibble.service.launcher.model import prepare_model


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def test_the_link_leads_to_the_converted_model_wherever_the_volume_is_mounted(
    source: Path, tmp_path: Path, console: Console
) -> None:
    assert prepare_model(source, tmp_path / "volume" / "served", console) == "tiny"
    shutil.move(tmp_path / "volume", tmp_path / "elsewhere")
    load_checkpoint(tmp_path / "elsewhere" / "served")


def test_another_model_replaces_the_link_and_the_same_one_is_not_converted_again(
    source: Path, tmp_path: Path, console: Console
) -> None:
    output = tmp_path / "volume" / "served"
    prepare_model(source, output, console)
    first, inode = output.resolve(), (output / "model.safetensors").stat().st_ino
    other = write_tiny_gguf(tmp_path / "other.gguf", TinyGGUF())
    assert prepare_model(other, output, console) == "other"
    assert output.resolve() != first
    prepare_model(source, output, console)
    assert (output.resolve(), (output / "model.safetensors").stat().st_ino) == (first, inode)


def test_a_native_directory_elsewhere_is_linked_as_it_is(source: Path, tmp_path: Path, console: Console) -> None:
    prepare_model(source, tmp_path / "volume" / "served", console)
    native = (tmp_path / "volume" / "served").resolve()
    (tmp_path / "other").mkdir()
    prepare_model(native, tmp_path / "other" / "served", console)
    assert (tmp_path / "other" / "served").resolve() == native


def test_a_directory_in_the_place_of_the_link_is_left_alone(source: Path, tmp_path: Path, console: Console) -> None:
    output = tmp_path / "served"
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(ModelNotFound, match="is a directory"):
        prepare_model(source, output, console)
    assert (output / "mine").exists()
