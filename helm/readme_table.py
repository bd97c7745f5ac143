"""`python helm/readme_table.py`: write the table of values in the chart's README, from its schema and its defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "nibble"
README = CHART / "README.md"
BEGIN = "<!-- Made by `make docs` from values.schema.json and values.yaml. -->"


def table() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    rows = [f"| `{path}` | `{default}` | {text} |" for path, default, text in _rows(schema, values, "")]
    return "\n".join(["| value | default | |", "| --- | --- | --- |", *rows, ""])


def _rows(schema: dict[str, Any], values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and description of each value that has no values of its own."""
    for name, default in values.items():
        described = schema["properties"][name]
        if "properties" in described:
            yield from _rows(described, default, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(default, ensure_ascii=False), described["description"]


def readme() -> str:
    """The file with its table made anew."""
    return README.read_text().partition(BEGIN)[0] + f"{BEGIN}\n\n{table()}"


if __name__ == "__main__":
    README.write_text(readme())
