"""The chart's schema and README against its values and the settings. Needs no helm."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.settings import PREFIX, ProcessSettings
from nibble.service.worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "nibble"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())

# What the chart decides from other values, the images, or each process for itself: ids are unique, after a restart too.
OF_BOTH = {
    "NIBBLE_REDIS_URL",
    "NIBBLE_NAMESPACE",
    "NIBBLE_MODEL_DIR",
    "NIBBLE_MODEL_NAME",
    "NIBBLE_LOG_LEVEL",
    "NIBBLE_TRACING",
}
OF_GATEWAYS = OF_BOTH | {
    "NIBBLE_GATEWAY_ID",
    "NIBBLE_HOST",
    "NIBBLE_PORT",
    "NIBBLE_DRAIN_S",
    "NIBBLE_API_KEYS",
    "NIBBLE_API_KEYS_FILE",
    "NIBBLE_METRICS_PUBLIC",
}
OF_WORKERS = OF_BOTH | {"NIBBLE_WORKER_ID", "NIBBLE_DEVICE", "NIBBLE_METRICS_HOST", "NIBBLE_METRICS_PORT"}


def objects(schema: dict[str, Any], values: Any, path: str = "") -> list[tuple[str, dict[str, Any], Any]]:
    """Each part of the schema that lists its properties, with its values."""
    if "properties" not in schema:
        return []
    found = [(path, schema, values)]
    for name, part in schema["properties"].items():
        if name in values:
            found += objects(part, values[name], f"{path}.{name}")
    return found


def test_the_schema_has_exactly_the_values_and_says_what_each_is() -> None:
    parts = objects(SCHEMA, VALUES)
    assert len(parts) > 20
    for path, schema, values in parts:
        assert schema["additionalProperties"] is False, path
        assert set(schema["properties"]) - {"global"} == set(values), path
        for name, described in schema["properties"].items():
            assert described["description"].endswith("."), f"{path}.{name}"


def open_objects(schema: dict[str, Any], path: str) -> list[str]:
    """Paths at which any key would be accepted."""
    found = []
    if schema.get("type") == "object" and not {"additionalProperties", "propertyNames"} & set(schema):
        found.append(path)
    for name, part in schema.get("properties", {}).items():
        found += open_objects(part, f"{path}.{name}")
    if "items" in schema:
        found += open_objects(schema["items"], f"{path}[]")
    return found


def test_no_key_is_accepted_that_nobody_reads() -> None:
    assert open_objects(SCHEMA, "") == [".global"]  # Helm's own


@pytest.mark.parametrize(
    ("component", "settings", "decided"),
    [("gateway", GatewaySettings, OF_GATEWAYS), ("worker", WorkerSettings, OF_WORKERS)],
)
def test_every_setting_can_be_given(component: str, settings: type[ProcessSettings], decided: set[str]) -> None:
    variables = {PREFIX + name.upper() for name in settings.model_fields}
    assert decided <= variables
    part = SCHEMA["properties"][component]["properties"]["settings"]
    assert set(part["propertyNames"]["enum"]) == variables - decided


def test_the_readme_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "helm"))
    import readme_table

    assert readme_table.readme() == readme_table.README.read_text()
    sys.modules.pop("readme_table")


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    package = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version = "))
    assert package == f'version = "{chart["appVersion"]}"'
    for name in ("gateway", "workerCPU", "workerCUDA"):
        assert VALUES["images"][name].endswith(f":{chart['appVersion']}")
