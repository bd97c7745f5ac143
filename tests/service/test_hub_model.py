"""Models by id, from a hub on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import FILES, NOWHERE, FakeHub, point_to
from huggingface_hub import constants

from nibble.service.hub_model import HubModelError, fetch_hub_model, is_hub_id


def fetch(source: str) -> tuple[Path, list[float]]:
    shares: list[float] = []
    path = fetch_hub_model(Path(source), lambda stage, share: shares.append(share))
    return path, shares


def test_weights_configuration_and_nothing_else_are_fetched_once(hub: FakeHub) -> None:
    directory, shares = fetch("some/model")
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    assert sorted(hub.requested) == ["config.json", "model.safetensors"]
    assert shares[-1:] == [1.0]
    assert fetch("some/model")[0] == directory
    assert len(hub.requested) == 2


def test_a_gguf_file_is_fetched_alone(hub: FakeHub) -> None:
    path, _ = fetch("some/model/model-q4.gguf")
    assert (path.name, path.read_bytes()) == ("model-q4.gguf", FILES["model-q4.gguf"])
    assert hub.requested == ["model-q4.gguf"]


def test_a_download_that_is_broken_off_goes_on_where_it_was(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is kept of a part
    hub.breaks_off = True
    directory, _ = fetch("some/model")
    assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert any(hub.ranges)


def test_without_a_connection_what_was_fetched_is_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, _ = fetch("some/model")
    point_to(NOWHERE, monkeypatch)
    assert fetch("some/model")[0] == directory


def offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(NOWHERE, monkeypatch)


def forbidden(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unchanged(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("some/model", offline, "some/model: is not on this machine, and the hub cannot be reached ("),
        ("some/model/model-q4.gguf", offline, "some/model: is not on this machine, and the hub cannot be reached ("),
        ("some/model", forbidden, "some/model: is not on this machine, and the hub cannot be reached ("),
        ("no/model", unchanged, "no/model: neither a file here nor a model on the hub (private ones need HF_TOKEN)"),
        ("gated/model", unchanged, "gated/model: its owner asks for an agreement first"),
        ("some/model/other.gguf", unchanged, "some/model: has no file other.gguf on the hub"),
    ],
)
def test_what_cannot_be_had_is_one_line_saying_why(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    change: Callable[[FakeHub, pytest.MonkeyPatch], None],
    message: str,
) -> None:
    change(hub, monkeypatch)
    with pytest.raises(HubModelError) as caught:
        fetch(source)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_id_is_what_is_no_path_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert is_hub_id(Path("Qwen/Qwen2.5-0.5B-Instruct"))
    assert is_hub_id(Path("Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_0.gguf"))
    for path in ("some/model", "../a", "/a/b", "model.gguf", "a/b/c", "a/b/c/d.gguf", "~/a"):
        assert not is_hub_id(Path(path)), path
