"""Writes the tables of configuration.md from the Settings classes: `python docs/settings_table.py` (`make docs`).

What a setting means is the string below its field.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from nibble.service.gateway.settings import GatewaySettings
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.settings import PREFIX, ProcessSettings
from nibble.service.worker.settings import WorkerSettings

PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- written by settings_table.py -->\n", "<!-- end -->\n"
_SECTIONS = (
    ("All processes", ProcessSettings),
    ("Gateway", GatewaySettings),
    ("Worker", WorkerSettings),
    ("Launcher: `nibble serve`", LauncherSettings),
)
_LIMITS = (("minimum", "at least {}"), ("exclusiveMinimum", "above {}"), ("maximum", "at most {}"))
_KINDS = {"boolean": "`true`, `false`", "integer": "integer", "number": "number", "string": "text", "array": "a,b,c"}


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    tables = [line for title, settings in _SECTIONS for line in _section(title, settings)]
    return before + BEGIN + "\n".join(tables) + END + rest.partition(END)[2]


def _section(title: str, settings: type[ProcessSettings]) -> Iterator[str]:
    schemas, meanings = settings.model_json_schema(), _meanings(settings)
    yield f"## {title}\n"
    yield "| variable | values | default | |"
    yield "| --- | --- | --- | --- |"
    for name, meaning in meanings.items():
        values = _values(settings, name, schemas["properties"][name], schemas.get("$defs", {}))
        yield f"| `{PREFIX}{name.upper()}` | {values} | {_default(settings, name)} | {meaning} |"
    yield ""


def _meanings(settings: type[ProcessSettings]) -> dict[str, str]:
    """Of the fields that the class itself has. A field without a meaning is a KeyError or an IndexError here."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for field, below in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            assert isinstance(text, ast.Constant), f"{settings.__name__}.{field.target.id} has no meaning"
            meanings[field.target.id] = " ".join(str(text.value).split())
    return meanings


def _values(settings: type[ProcessSettings], name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if settings.model_fields[name].annotation in (ByteSize, ByteSize | None):
        return "bytes: `2GiB`, `1.5GB`"
    (kind,) = (kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null")
    if "$ref" in kind:
        kind = definitions[kind["$ref"].rsplit("/", 1)[1]]
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    if kind.get("format") == "path":
        return "path"
    limits = [text.format(kind[limit]) for limit, text in _LIMITS if limit in kind]
    return ", ".join([_KINDS[kind["type"]], *limits])


def _default(settings: type[ProcessSettings], name: str) -> str:
    """Empty where it depends on something: then the meaning says on what."""
    field = settings.model_fields[name]
    if field.is_required():
        return "required"
    if field.default is None or field.default_factory is not None:
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, ByteSize):
        return f"`{field.default.human_readable()}`"
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{field.default}`" if field.default != () else ""


if __name__ == "__main__":
    PAGE.write_text(page())
