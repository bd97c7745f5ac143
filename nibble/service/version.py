"""The version that a process says it is of."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def nibble_version() -> str:
    try:
        return version("nibble")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+source"
