"""The direction of imports: service -> engine -> kernels, and the few doors between rooms. docs: architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "nibble").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}

HEAVY = ("torch", "numba", "cupy", "cupyx", "cuda", "transformers")


@cache
def imported_by(module: str) -> frozenset[str]:
    """Every absolute name that the module imports, anywhere in it; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(names)


def is_within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def violations(importers: Callable[[str], bool], forbidden: Callable[[str], bool]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in MODULES
        if importers(module)
        for name in sorted(imported_by(module))
        if forbidden(name)
    ]


def test_the_walk_sees_the_code() -> None:
    assert "nibble.engine.protocol" in MODULES
    assert any(is_within(name, "nibble.engine.protocol") for name in imported_by("nibble.service.gateway.plan"))


def test_kernels_import_no_other_room() -> None:
    assert not violations(
        lambda module: is_within(module, "nibble.kernels"),
        lambda name: is_within(name, "nibble") and not is_within(name, "nibble.kernels"),
    )


def test_engine_imports_kernels_and_grammar_alone() -> None:
    rooms = ("nibble.engine", "nibble.kernels", "nibble.grammar")
    assert not violations(
        lambda module: is_within(module, "nibble.engine"),
        lambda name: is_within(name, "nibble") and not is_within(name, *rooms),
    )


def test_grammar_knows_the_engine_by_its_protocol_alone() -> None:
    rooms = ("nibble.grammar", "nibble.engine.protocol")
    assert not violations(
        lambda module: is_within(module, "nibble.grammar"),
        lambda name: is_within(name, "nibble") and not is_within(name, *rooms),
    )


def test_gateway_and_broker_know_the_engine_by_its_protocol_alone() -> None:
    assert not violations(
        lambda module: is_within(module, "nibble.service.gateway", "nibble.service.broker"),
        lambda name: is_within(name, "nibble.engine") and not is_within(name, "nibble.engine.protocol"),
    )


def test_only_the_worker_names_a_kernels_backend() -> None:
    assert not violations(
        lambda module: is_within(module, "nibble.service") and not is_within(module, "nibble.service.worker"),
        lambda name: is_within(name, "nibble.kernels"),
    )


def test_no_room_imports_what_people_start_with() -> None:
    assert not violations(
        lambda module: is_within(module, "nibble.kernels", "nibble.engine", "nibble.service"),
        lambda name: is_within(name, "nibble.llm", "nibble.chat", "nibble.cli"),
    )


def test_processes_do_not_import_each_other() -> None:
    for process, others in (
        ("gateway", ("worker", "launcher")),
        ("worker", ("gateway", "launcher")),
        ("broker", ("gateway", "worker", "launcher")),
    ):
        forbidden = [f"nibble.service.{other}" for other in others]
        assert not violations(
            lambda module, process=process: is_within(module, f"nibble.service.{process}"),  # type: ignore[misc]
            lambda name, forbidden=forbidden: is_within(name, *forbidden),  # type: ignore[misc]
        )


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("redis", ("nibble.service.broker",)),
        ("torch", ("nibble.kernels.cpu", "nibble.engine.quantize", "nibble.engine.evaluate")),
        ("transformers", ("nibble.engine.quantize", "nibble.engine.evaluate")),
        ("cupy", ("nibble.kernels.cuda",)),
        ("cupyx", ("nibble.kernels.cuda",)),
        ("cuda", ("nibble.kernels.cuda",)),
        ("numba", ("nibble.kernels.cpu",)),
        ("fastapi", ("nibble.service.gateway",)),
        ("starlette", ("nibble.service.gateway",)),
        ("pydantic", ("nibble.service",)),
        ("llguidance", ("nibble.grammar", "nibble.engine.grammar")),
        (
            "opentelemetry",
            ("nibble.service.tracing", "nibble.service.gateway.tracing", "nibble.service.worker.tracing"),
        ),
    ],
)
def test_package_is_imported_only_in_its_place(package: str, allowed: tuple[str, ...]) -> None:
    assert not violations(lambda module: not is_within(module, *allowed), lambda name: is_within(name, package))


def test_every_package_file_is_empty() -> None:
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if path.name == "__init__.py" and path.read_bytes()]


def test_every_directory_of_code_is_a_package() -> None:
    directories = {path.parent for path in SOURCES}
    assert not [str(directory) for directory in directories if not (directory / "__init__.py").exists()]


@pytest.mark.parametrize("module", ["nibble.service.gateway.__main__", "nibble.service.broker.worker_side"])
def test_process_starts_without_the_heavy_packages(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded & set(HEAVY)
    engine = {name for name in loaded if is_within(name, "nibble.engine")}
    assert engine == {"nibble.engine", "nibble.engine.protocol"}
    assert not {name for name in loaded if is_within(name, "nibble.kernels")}


@pytest.mark.parametrize("process", ["gateway", "worker"])
def test_a_process_starts_without_the_tracing_modules(process: str) -> None:
    code = f"import sys, nibble.service.{process}.__main__; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert f"nibble.service.{process}.settings" in loaded
    assert not {name for name in loaded if is_within(name, "nibble.service") and name.endswith(".tracing")}
    assert not {name for name in loaded if is_within(name, "opentelemetry.sdk.trace", "opentelemetry.exporter")}


def gateway_modules() -> Iterator[str]:
    return (module for module in MODULES if is_within(module, "nibble.service.gateway"))


def test_gateway_names_nothing_heavy() -> None:
    assert not [
        f"{module} imports {name}"
        for module in gateway_modules()
        for name in imported_by(module)
        if is_within(name, *HEAVY)
    ]
