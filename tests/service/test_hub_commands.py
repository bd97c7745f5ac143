"""Commands that take a model, given an id on the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub
from gguf_files import write_tiny_gguf
from hf_models import random_hf_model, save_hf_model

from nibble.engine.checkpoint.resolve import FILES


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Of a process that takes `hub` for the hub, which has a model in floating point and one in GGUF."""
    save_hf_model(random_hf_model("llama"), tmp_path / "model")
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.files["tiny.gguf"] = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "NIBBLE_CACHE_DIR": str(tmp_path / "cache")}
    return {**os.environ, **cache, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "NIBBLE_DEVICE": "cpu"}


def nibble(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nibble.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize(
    "command", [("convert", "some/model/tiny.gguf"), ("quantize", "some/model", "--method", "rtn", "--device", "cpu")]
)
def test_a_checkpoint_is_made_of_an_id(environment: dict[str, str], tmp_path: Path, command: tuple[str, ...]) -> None:
    result = nibble(environment, *command, "-o", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= set(FILES)
    assert "downloading some/model" in result.stderr


def test_nothing_is_downloaded_for_an_output_that_exists(
    hub: FakeHub, environment: dict[str, str], tmp_path: Path
) -> None:
    for command in ("convert", "quantize"):
        result = nibble(environment, command, "some/model", "-o", str(tmp_path))
        assert (result.returncode, result.stderr) == (1, f"nibble: {tmp_path}: exists already\n")
    assert not hub.requested


def test_plan_of_an_id_is_that_of_its_files(hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    for name, path in (("some/model", "model"), ("some/model/tiny.gguf", "tiny.gguf")):
        of_id = nibble(environment, "plan", name, "--gpu-memory", "24GiB")
        of_files = nibble(environment, "plan", str(tmp_path / path), "--gpu-memory", "24GiB")
        assert of_id.returncode == of_files.returncode == 0, of_id.stderr
        assert of_id.stdout == of_files.stdout
    assert not (tmp_path / "hub").exists()


def test_plan_of_what_is_not_supported_names_the_model(hub: FakeHub, environment: dict[str, str]) -> None:
    hub.files["config.json"] = b'{"model_type": "gemma"}'
    result = nibble(environment, "plan", "some/model", "--gpu-memory", "24GiB")
    assert result.returncode == 1
    assert "nibble: some/model/config.json: model_type 'gemma' is not supported, only llama" in result.stderr


def test_ladder_of_an_id(environment: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of its own, and so on. " * 40)
    sizes = ("--num-sequences", "1", "--sequence-tokens", "64", "--generated-tokens", "8")
    result = nibble(environment, "ladder", "some/model", "--text", str(text), *sizes, "-o", str(tmp_path / "report"))
    assert result.returncode == 0, result.stderr
    assert '"model": "model"' in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize("command", [("convert", "-o", "out"), ("quantize", "-o", "out"), ("ladder",), ("plan",)])
def test_an_id_that_nobody_has_is_one_line(
    environment: dict[str, str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    if name == "plan":
        options = ["--gpu-memory", "8GiB"]
    result = nibble({**environment, "PYTHONPATH": os.getcwd()}, name, "no/model", *options)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("nibble: no/model: neither a file here nor a model on the hub")
    assert "Traceback" not in result.stderr
