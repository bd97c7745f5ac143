"""Fixtures that every test directory may use.

The demo model is downloaded once per machine, into the user's cache. Where nothing can be downloaded,
TEST_DEMO_CHECKPOINT names a native directory of it; what needs the GGUF file itself cannot run there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _silent(stage: str, done: float) -> None:
    pass


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """Where `nibble serve` would keep models."""
    return Path(os.environ.get("NIBBLE_CACHE_DIR") or Path.home() / ".cache" / "nibble")


@pytest.fixture(scope="session")
def demo_gguf(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    from nibble.service.demo_model import fetch_demo_model

    return fetch_demo_model(cache_dir, _silent)


@pytest.fixture(scope="session")
def demo_checkpoint(cache_dir: Path, request: pytest.FixtureRequest) -> Path:
    """The demo model's native directory."""
    given = os.environ.get("TEST_DEMO_CHECKPOINT")
    if given:
        return Path(given)
    from nibble.engine.checkpoint.resolve import resolve_checkpoint

    return resolve_checkpoint(request.getfixturevalue("demo_gguf"), cache_dir, _silent)
