"""The dashboards against the types that Grafana itself is made of, of the version in docker-compose.yml."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from charts import ROOT, TOOLS

pytestmark = pytest.mark.helm

TYPES = Path(__file__).with_name("dashboard_types.ts")
DASHBOARDS = sorted((ROOT / "observability" / "grafana" / "dashboards").glob("*.json"))


def complaints(dashboards: dict[str, dict[str, Any]], directory: Path) -> dict[str, list[str]]:
    """What the compiler says of the fields of each, and of what each panel's plugin is told; by their names."""
    for name, dashboard in dashboards.items():
        (directory / f"{name}.ts").write_text("\n".join(declarations(dashboard)))
    (directory / TYPES.name).write_text(TYPES.read_text())
    (directory / "node_modules").symlink_to(TOOLS / "node_modules")
    compiler = directory / "node_modules" / ".bin" / "tsc"
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    files = [f"{name}.ts" for name in dashboards]
    done = subprocess.run([compiler, *options, *files], cwd=directory, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    found = {name: [line for line in lines if line.startswith(f"{name}.ts(")] for name in dashboards}
    # Details of a complaint are indented below it.
    assert sum(map(len, found.values())) == sum(not line.startswith(" ") for line in lines), done.stdout
    assert (done.returncode == 0) == (not lines), done.stderr
    return found


def declarations(dashboard: dict[str, Any]) -> list[str]:
    lines = [
        'import type { ADashboard, Custom, Options } from "./dashboard_types";',
        f"export const dashboard: ADashboard = {json.dumps(dashboard)};",
    ]
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            name, custom = panel["id"], panel["fieldConfig"]["defaults"].get("custom", {})
            lines.append(f"export const o{name}: Options[{panel['type']!r}] = {json.dumps(panel['options'])};")
            lines.append(f"export const c{name}: Custom[{panel['type']!r}] = {json.dumps(custom)};")
    return lines


def test_grafana_knows_every_field_and_value(tmp_path: Path) -> None:
    assert len(DASHBOARDS) == 5
    found = complaints({path.stem: json.loads(path.read_text()) for path in DASHBOARDS}, tmp_path)
    assert not any(found.values()), found


def test_grafana_knows_no_others(tmp_path: Path) -> None:
    good = json.loads(DASHBOARDS[0].read_text())
    legend, unit, kind = (json.loads(DASHBOARDS[0].read_text()) for _ in range(3))
    timeseries = next(i for i, panel in enumerate(good["panels"]) if panel["type"] == "timeseries")
    legend["panels"][timeseries]["options"]["legend"]["displayMode"] = "chart"
    unit["panels"][timeseries]["fieldConfig"]["defaults"]["units"] = "s"
    kind["panels"][timeseries]["type"] = "graph"
    wrong = {
        "field": {**good, "uuid": "x"},
        "value": {**good, "refresh": 5},
        "legend": legend,
        "unit": unit,
        "kind": kind,
    }
    found = complaints({"good": good, **wrong}, tmp_path)
    assert not found.pop("good")
    assert all(found.values()), found


def test_the_types_are_those_of_the_grafana_that_is_run() -> None:
    package = json.loads(Path(__file__).with_name("package.json").read_text())
    assert f"grafana/grafana:{package['dependencies']['@grafana/schema']}" in (ROOT / "docker-compose.yml").read_text()
