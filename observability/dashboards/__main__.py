"""Writes the JSON of all dashboards: `python -m observability.dashboards` (`make dashboards`)."""

from __future__ import annotations

from pathlib import Path

from observability.dashboards import broker, engine, roof, slo, tenants
from observability.dashboards.panels import render

PAGES = (slo.PAGE, engine.PAGE, roof.PAGE, broker.PAGE, tenants.PAGE)
FOLDER = Path(__file__).parents[1] / "grafana" / "dashboards"


def files() -> dict[str, str]:
    """Name -> content of each file in FOLDER."""
    return {f"{page.uid}.json": render(page) for page in PAGES}


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
