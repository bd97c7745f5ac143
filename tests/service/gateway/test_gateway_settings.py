"""The gateway's variables: each is known to all processes, and keys are a comma-separated list."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.settings import KNOWN_VARIABLES, PREFIX, SettingsError


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in KNOWN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NIBBLE_MODEL_DIR", "/models/x")
    return monkeypatch


def test_every_setting_is_a_known_variable() -> None:
    assert {PREFIX + name.upper() for name in GatewaySettings.model_fields} <= KNOWN_VARIABLES


def test_values_are_read(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NIBBLE_API_KEYS", " one, two,,")
    environment.setenv("NIBBLE_MAX_BODY_BYTES", "2MiB")
    settings = GatewaySettings.from_environment()
    assert settings.model_dir == Path("/models/x")
    assert settings.api_keys == ("one", "two")
    assert settings.max_body_bytes == 2 * 2**20


def test_no_keys_by_default_and_an_id_for_each_process(environment: pytest.MonkeyPatch) -> None:
    first, second = GatewaySettings.from_environment(), GatewaySettings.from_environment()
    assert first.api_keys == ()
    assert first.gateway_id != second.gateway_id


@pytest.mark.parametrize(("name", "value"), [("PORT", "70000"), ("DRAIN_S", "-1"), ("DEFAULT_MAX_TOKENS", "0")])
def test_value_out_of_range_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(PREFIX + name, value)
    with pytest.raises(SettingsError, match=PREFIX + name):
        GatewaySettings.from_environment()


def test_settings_cannot_be_changed(environment: pytest.MonkeyPatch) -> None:
    settings = GatewaySettings.from_environment()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
