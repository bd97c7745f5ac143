"""The list of known variables, against the settings classes that read them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.settings import KNOWN_VARIABLES, PREFIX, SettingsError, check_variable_names
from nibble.service.worker.settings import WorkerSettings


def test_the_known_variables_are_those_that_some_process_reads() -> None:
    fields = {name for cls in (GatewaySettings, WorkerSettings, LauncherSettings) for name in cls.model_fields}
    assert {PREFIX + name.upper() for name in fields} == KNOWN_VARIABLES


def test_a_misspelt_variable_is_an_error_that_names_the_right_one() -> None:
    with pytest.raises(SettingsError, match=r"NIBBLE_MODEL_NAM: no such setting; did you mean NIBBLE_MODEL_NAME\?"):
        check_variable_names({"NIBBLE_MODEL_NAM": "x", "OTHER": "y"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NIBBLE_MAX_NUM_SEQUENCES", "0"),
        ("NIBBLE_KV_CACHE_BYTES", "many"),
        ("NIBBLE_DEVICE", "tpu"),
        ("NIBBLE_GPU_MEMORY_UTILIZATION", "1.5"),
        ("NIBBLE_SPECULATION", "always"),
        ("NIBBLE_NUM_DRAFTS", "8"),
        ("NIBBLE_LEASE_S", "-1"),
        ("NIBBLE_METRICS_PORT", "70000"),
    ],
)
def test_a_bad_worker_value_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("NIBBLE_MODEL_DIR", "/nowhere")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{name}: .*got '{value}'"):
        WorkerSettings.from_environment()


def test_byte_sizes_take_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIBBLE_MODEL_DIR", "/nowhere")
    monkeypatch.setenv("NIBBLE_KV_CACHE_BYTES", "2GiB")
    assert WorkerSettings.from_environment().kv_cache_bytes == 2 << 30


def test_the_page_of_all_settings_is_current() -> None:
    """`make docs` writes it."""
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "configuration.md").read_text()
    assert text == runpy.run_path(str(docs / "settings_table.py"))["page"]()
    assert set(re.findall(r"^\| `(NIBBLE_\w+)`", text, re.MULTILINE)) == KNOWN_VARIABLES
