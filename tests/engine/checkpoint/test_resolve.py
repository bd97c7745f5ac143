from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from gguf_files import TinyGGUF, write_tiny_gguf
from hf_models import random_hf_model, save_hf_model

from nibble.engine.checkpoint.cache import exclusive
from nibble.engine.checkpoint.errors import CheckpointError, ConversionError, SafetensorsError, SourceError
from nibble.engine.checkpoint.native import WEIGHTS_FILE, load_checkpoint
from nibble.engine.checkpoint.resolve import FILES, convert_model, resolve_checkpoint


def quiet(stage: str, done: float) -> None:
    pass


def never(stage: str, done: float) -> None:
    raise AssertionError(f"there is nothing to do, but it is {stage}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "some" / "cache"


def models(cache: Path) -> list[str]:
    """What is in the cache but for locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_converted_once_and_its_directory_resolves_to_itself(source: Path, cache: Path) -> None:
    directory = resolve_checkpoint(source, cache, quiet)
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    assert directory.name.startswith("tiny-")
    assert load_checkpoint(directory).config.hidden_size == 64
    assert resolve_checkpoint(source, cache, never) == directory
    assert resolve_checkpoint(directory, cache, never) == directory


def test_a_long_name_in_any_script_is_cut(source: Path, cache: Path) -> None:
    path = source.rename(source.with_name("模" * 80 + ".gguf"))
    assert load_checkpoint(resolve_checkpoint(path, cache, quiet)).config.hidden_size == 64


def test_a_hugging_face_directory_is_converted_once(tmp_path: Path, cache: Path) -> None:
    source = save_hf_model(random_hf_model("llama"), tmp_path / "author" / "some-model")
    directory = resolve_checkpoint(source, cache, quiet)
    assert directory.name.startswith("some-model-")
    assert load_checkpoint(directory).config.hidden_size == 128
    assert resolve_checkpoint(source, cache, never) == directory
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_checkpoint(resolve_checkpoint(source, cache, quiet)).config.eos_token_ids == (2, 7)


def test_a_changed_file_is_converted_anew(source: Path, cache: Path) -> None:
    first = resolve_checkpoint(source, cache, quiet)
    write_tiny_gguf(source, TinyGGUF(num_layers=3))
    second = resolve_checkpoint(source, cache, quiet)
    assert (load_checkpoint(first).config.num_layers, load_checkpoint(second).config.num_layers) == (2, 3)


def test_an_interrupted_conversion_leaves_nothing(source: Path, cache: Path) -> None:
    def interrupt(stage: str, done: float) -> None:
        if done > 0.5 and stage == "converting the weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(source, cache, interrupt)
    assert models(cache) == []
    resolve_checkpoint(source, cache, quiet)


def test_a_disk_that_is_full_is_an_error_and_leaves_nothing(source: Path, cache: Path) -> None:
    """The limit on file sizes stands in for a full disk: the write fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ConversionError, match=r"model\.safetensors: cannot be written: File too large"):
            resolve_checkpoint(source, cache, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert models(cache) == []


PROGRAM = """
import pathlib, sys
from nibble.engine.checkpoint.resolve import resolve_checkpoint
stages = []
def progress(stage, done):
    if stage not in stages:
        stages.append(stage)
        print(stage, flush=True)
    if stage == sys.argv[3]:
        sys.stdin.read()
print(resolve_checkpoint(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), progress), flush=True)
"""


def start(source: Path, cache: Path, stop_at: str = "") -> subprocess.Popen[str]:
    """Another process that resolves `source`, and waits for the end of its input when it reaches a stage."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(cache), stop_at]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_at_once_one_converts(source: Path, cache: Path) -> None:
    with start(source, cache, "converting the weights") as first:
        assert first.stdout is not None
        while first.stdout.readline() != "converting the weights\n":
            pass
        with start(source, cache) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "waiting for another process that converts the model\n"
            first_rest = first.communicate("", timeout=60)[0].splitlines()
            second_rest = second.communicate("", timeout=60)[0].splitlines()
    assert (first.returncode, second.returncode) == (0, 0)
    assert len(first_rest) == len(second_rest) == 1
    assert first_rest == second_rest


def test_a_killed_conversion_is_cleaned_up_by_the_next(source: Path, cache: Path) -> None:
    with start(source, cache, "converting the weights") as process:
        assert process.stdout is not None
        while process.stdout.readline() != "converting the weights\n":
            pass
        process.kill()
    assert [".partial-" in name for name in models(cache)] == [True]
    directory = resolve_checkpoint(source, cache, quiet)
    assert models(cache) == [directory.name]
    load_checkpoint(directory)


@pytest.mark.parametrize("damage", ["cut the weights", "remove the tokenizer"])
def test_a_damaged_conversion_is_made_again(
    damage: str, source: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = resolve_checkpoint(source, cache, quiet)
    if damage == "cut the weights":
        os.truncate(directory / WEIGHTS_FILE, 1000)
    else:
        (directory / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert resolve_checkpoint(source, cache, quiet) == directory
    assert "will be made again" in caplog.text
    assert resolve_checkpoint(source, cache, never) == directory


def weights_alone(directory: Path) -> None:
    directory.mkdir()
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, directory / WEIGHTS_FILE)


def native_without_tokenizer(directory: Path) -> None:
    gguf_file = write_tiny_gguf(directory.with_suffix(".gguf"))
    shutil.copytree(resolve_checkpoint(gguf_file, directory.parent / "cache", quiet), directory)
    (directory / "tokenizer_config.json").unlink()


def native_cut_short(directory: Path) -> None:
    native_without_tokenizer(directory)
    os.truncate(directory / WEIGHTS_FILE, 20_000)


def with_gguf(directory: Path) -> None:
    directory.mkdir()
    write_tiny_gguf(directory / "a.gguf")


def unreadable(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: None, SourceError, "source: there is no such file or directory"),
        (lambda path: path.mkdir(), SourceError, "source: holds no model; supported are a GGUF file, a Hugging Face"),
        (weights_alone, SourceError, "source: holds no model; supported are a GGUF file, a Hugging Face directory and"),
        (with_gguf, SourceError, "is a directory; name the GGUF file in it, such as "),
        (native_without_tokenizer, SourceError, "source: tokenizer_config.json is missing"),
        (native_cut_short, SafetensorsError, "model.safetensors: tensor "),
        (lambda path: path.write_text("hello"), SourceError, "source: is not a GGUF file; supported are a GGUF file"),
        (unreadable, SourceError, "source: there is no such file or directory"),
    ],
)
def test_what_is_no_model_is_one_line_saying_so(
    make: Callable[[Path], None], error: type[CheckpointError], message: str, tmp_path: Path, cache: Path
) -> None:
    make(tmp_path / "source")
    with pytest.raises(error) as caught:
        resolve_checkpoint(tmp_path / "source", cache, quiet)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_cache_that_cannot_be_made_is_one_line_saying_so(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"file/cache: the converted model cannot be stored: Not a directory"):
        resolve_checkpoint(source, tmp_path / "file" / "cache", quiet)


def test_a_target_that_another_process_makes_meanwhile_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "native"
    with ExitStack() as other:
        other.enter_context(exclusive(target))

        def finish(stage: str, done: float) -> None:
            assert stage.startswith("waiting")
            target.mkdir()
            other.close()

        with pytest.raises(ConversionError, match="exists already: another process has made it meanwhile"):
            convert_model(source, target, finish)
    assert not any(target.iterdir())
