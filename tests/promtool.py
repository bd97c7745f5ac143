"""promtool, the judge of metrics and rules; from Debian's package `prometheus`."""

from __future__ import annotations

import shutil
import subprocess

import pytest

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here: install Debian's package prometheus"
)


def lint(metrics: str) -> list[str]:
    """What `promtool check metrics` finds fault with."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=60, check=False
    )
    return (done.stdout + done.stderr).splitlines()
