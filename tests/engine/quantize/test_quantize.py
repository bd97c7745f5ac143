"""From a model on disk to a native checkpoint that the engine computes with."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from gguf_files import TinyGGUF, write_tiny_gguf
from hf_models import VOCAB_SIZE, random_hf_model, save_hf_model
from model_logits import Logits, all_logits, kl_divergence, transformers_logits
from transformers import PreTrainedModel

from nibble.engine.checkpoint.cache import exclusive
from nibble.engine.checkpoint.errors import CheckpointError, SourceError
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import FILES
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.engine.quantize.errors import OptionError, OutputError
from nibble.engine.quantize.options import Method, Options
from nibble.engine.quantize.quantize import STATISTICS_FILE, quantize
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Int4Weight, Mode
from nibble.kernels.layout import KVDtype

IDS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 100).tolist()


def silent(stage: str, done: float) -> None:
    pass


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_hf_model("qwen2", num_hidden_layers=3, intermediate_size=160)


@pytest.fixture(scope="module")
def source(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf_model(model, tmp_path_factory.mktemp("model"), "float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    letters = np.random.default_rng(1).choice(list("abcdefgh \n"), 6000)
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(letters))
    return path


def options(method: Method, text: Path | None, group_size: int = 32) -> Options:
    return Options(method, group_size, text, num_sequences=6, sequence_tokens=96, device="cpu")


def served_logits(directory: Path) -> Logits:
    return all_logits(directory, CPUKernels(), IDS, KVDtype.FP16, Mode.DECODE, [len(IDS)])


@pytest.mark.parametrize("method", Method)
def test_served_model_is_close_to_the_original(
    tmp_path: Path, model: PreTrainedModel, source: Path, text: Path, method: Method
) -> None:
    out = tmp_path / "out"
    quantize(source, out, options(method, text), silent)
    assert [path.name for path in tmp_path.iterdir() if path.name != "out.lock"] == ["out"]
    assert all((out / name).is_file() for name in FILES)
    checkpoint = load_checkpoint(out)
    linears = [checkpoint.linear(f"layers.2.{name}") for name in ("qkv", "o", "gate_up", "down")]
    assert all(isinstance(linear, Int4Weight) and linear.group_size == 32 for linear in linears)
    divergence = kl_divergence(transformers_logits(model, IDS), served_logits(out)).mean()
    assert divergence < 0.05  # with another model's weights: 2


def test_group_size_is_as_large_as_fits(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", options(Method.RTN, None, 128), silent)
    checkpoint = load_checkpoint(tmp_path / "out")
    sizes = {name: checkpoint.linear(f"layers.0.{name}").group_size for name in ("qkv", "o", "gate_up", "down")}  # type: ignore[union-attr]
    assert sizes == {"qkv": 128, "o": 128, "gate_up": 128, "down": 32}


def test_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path, source: Path, text: Path) -> None:
    quantize(source, tmp_path / "whole", options(Method.AWQ_GPTQ, text), silent)
    seen: list[float] = []

    def interrupt(stage: str, done: float) -> None:
        if stage.startswith("quantising"):
            seen.append(done)
            if len(seen) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "again", options(Method.AWQ_GPTQ, text), interrupt)
    assert not (tmp_path / "again").exists()
    work = tmp_path / "again.quantizing"
    finished = {path.name: path.stat().st_mtime_ns for path in work.glob("layer-*")}
    assert len(finished) == 2

    def check(stage: str, done: float) -> None:
        if stage.startswith("converting"):
            assert {name: (work / name).stat().st_mtime_ns for name in finished} == finished, "a layer was made again"

    quantize(source, tmp_path / "again", options(Method.AWQ_GPTQ, text), check)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_other_options_begin_anew(tmp_path: Path, source: Path, text: Path) -> None:
    def interrupt(stage: str, done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", options(Method.GPTQ, text), interrupt)
    quantize(source, tmp_path / "out", options(Method.RTN, text), silent)
    quantize(source, tmp_path / "other", options(Method.RTN, text), silent)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_statistics_are_those_of_the_specification(tmp_path: Path, source: Path, text: Path) -> None:
    quantize(source, tmp_path / "out", options(Method.GPTQ, text), silent)
    file = SafetensorsFile(tmp_path / "out" / STATISTICS_FILE)
    measures = {name.removeprefix("layers.1.") for name in file.specs if name.startswith("layers.1.")}
    inputs = {
        f"{key}_input.{m}"
        for key in ("qkv", "o", "gate_up", "down")
        for m in ("min", "max", "absmax", "mean", "absmean")
    }
    assert measures == inputs | {f"{kind}.{m}" for kind in ("keys", "values") for m in ("min", "max", "absmax")}
    low, high = file.array("layers.1.keys.min"), file.array("layers.1.keys.max")
    assert low.shape == (2, 64)
    assert (low < high).all()


def test_output_that_exists_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        quantize(source, tmp_path / "out", options(Method.RTN, None), silent)


def test_output_that_another_process_makes_meanwhile_is_left_alone(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with ExitStack() as other:
        other.enter_context(exclusive(out))

        def finish(stage: str, done: float) -> None:
            assert stage.startswith("waiting")
            out.mkdir()
            other.close()

        with pytest.raises(OutputError, match="exists already: another process has made it meanwhile"):
            quantize(source, out, options(Method.RTN, None), finish)
    assert not any(out.iterdir())


def test_output_that_cannot_be_written_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out: cannot be written: (Not a directory|File exists)"):
        quantize(source, tmp_path / "file" / "out", options(Method.RTN, None), silent)


def test_weights_in_four_bits_are_quantised_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kind, has_warning in (("F16", False), ("Q4_1", True)):
        path = write_tiny_gguf(tmp_path / f"{kind}.gguf", TinyGGUF(kind=kind))
        caplog.clear()
        quantize(path, tmp_path / kind, options(Method.RTN, None), silent)
        assert ("is stored in 4 bits" in caplog.text) == has_warning


def test_checkpoint_of_our_own_is_not_quantised_again(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", options(Method.RTN, None), silent)
    with pytest.raises(SourceError, match="is a native checkpoint; name the model that it was made of"):
        quantize(tmp_path / "out", tmp_path / "again", options(Method.RTN, None), silent)


def test_model_that_is_none_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        quantize(tmp_path / "nothing.gguf", tmp_path / "out", options(Method.RTN, None), silent)


def test_options_that_are_none_are_named() -> None:
    with pytest.raises(OptionError, match="must be one of rtn, sinq, awq, gptq, awq-gptq"):
        Method.named("aqw")
    with pytest.raises(OptionError, match="group size"):
        Options(group_size=48)
