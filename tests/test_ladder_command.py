"""`nibble ladder` up to its files, on a tiny model, and what it refuses before it measures anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hf_models import random_hf_model, save_hf_model

from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.quantize.errors import CalibrationError
from nibble.engine.quantize.options import Method, Options
from nibble.engine.quantize.quantize import quantize
from nibble.ladder import Request, run_ladder
from nibble.service.settings import SettingsError


def silent(stage: str, done: float) -> None:
    pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NIBBLE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a quantised one of it."""
    directory = tmp_path_factory.mktemp("models")
    source = save_hf_model(random_hf_model("llama"), directory / "model")
    quantize(source, directory / "quantized", Options(Method.RTN, group_size=32, device="cpu"), silent)
    return directory


@pytest.fixture
def request_(directory: Path, tmp_path: Path) -> Request:
    return Request(
        model=directory / "model",
        quantized=directory / "quantized",
        text=None,
        num_sequences=1,
        sequence_tokens=64,
        generated_tokens=8,
        gpu_memory=None,
        max_kl=0.1,
        output=tmp_path / "reports" / "tiny",
    )


def test_report_is_written_beside_the_table(request_: Request, capsys: pytest.CaptureFixture[str]) -> None:
    run_ladder(replace(request_, gpu_memory="24GiB"))
    printed = capsys.readouterr().out
    assert request_.output is not None
    report = msgspec.json.decode(request_.output.with_suffix(".json").read_bytes())
    assert f"Recommended within a mean KL divergence of 0.1: {report['recommended']}" in printed
    expected = {
        "model": "model",
        "quantized": "quantized",
        "text": "evaluation.txt",
        "num_sequences": 1,
        "sequence_tokens": 64,
        "generated_tokens": 8,
        "device": "cpu",
        "max_mean_kl": 0.1,
    }
    assert {name: report[name] for name in expected} == expected
    assert [rung["batch_size"] for rung in report["rungs"]] == [2] * 4
    assert all(rung["tokens_that_fit"] > 0 for rung in report["rungs"])
    assert "1 sequences of 64 tokens of evaluation.txt" in request_.output.with_suffix(".html").read_text()


def test_more_generated_tokens_than_the_context_are_refused(request_: Request) -> None:
    with pytest.raises(SettingsError, match="481 generated tokens and prompts of 32: the model's context is 512"):
        run_ladder(replace(request_, generated_tokens=481))


def test_native_checkpoint_is_no_model_to_compare_with(request_: Request, directory: Path) -> None:
    with pytest.raises(SourceError, match="--quantized"):
        run_ladder(replace(request_, model=directory / "quantized", quantized=None))


def test_text_that_is_too_short_is_refused(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(CalibrationError, match="the text has"):
        run_ladder(replace(request_, text=tmp_path / "short.txt"))


def test_report_that_cannot_be_written_is_named(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "reports" / "tiny.html").mkdir(parents=True)
    with pytest.raises(OSError, match=r"tiny\.html: cannot be written: Is a directory"):
        run_ladder(request_)
