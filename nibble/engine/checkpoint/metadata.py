"""Typed reading of a GGUF file's key-value pairs: absent values and wrong kinds are errors naming their key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import GGUFError

Numbers: TypeAlias = npt.NDArray[np.generic]
MetadataValue: TypeAlias = bool | int | float | str | list[str] | Numbers


class Metadata(Mapping[str, MetadataValue]):
    """The key-value pairs of one GGUF file. The typed getters return None for an absent key."""

    def __init__(self, values: Mapping[str, MetadataValue], source: str) -> None:
        self._values = values
        self._source = source

    def __getitem__(self, key: str) -> MetadataValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def string(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_kind(key, "a string", value)

    def boolean(self, key: str) -> bool | None:
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong_kind(key, "a boolean", value)

    def integer(self, key: str) -> int | None:
        value = self._values.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong_kind(key, "one integer", value)

    def number(self, key: str) -> float | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise self._wrong_kind(key, "one number", value)

    def strings(self, key: str) -> list[str] | None:
        value = self._values.get(key)
        if value is None or isinstance(value, list):
            return value
        raise self._wrong_kind(key, "an array of strings", value)

    def numbers(self, key: str) -> Numbers | None:
        value = self._values.get(key)
        if value is None or isinstance(value, np.ndarray):
            return value
        raise self._wrong_kind(key, "an array of numbers", value)

    def required(self, key: str) -> GGUFError:
        """The error to raise where a key has no default."""
        return GGUFError(f"{self._source}: metadata key {key} is missing")

    def out_of_range(self, key: str, expected: str) -> GGUFError:
        """The error to raise for a value of the right kind that makes no sense."""
        return GGUFError(f"{self._source}: metadata key {key} is {_shown(self._values[key])}, expected {expected}")

    def _wrong_kind(self, key: str, expected: str, value: MetadataValue) -> GGUFError:
        return GGUFError(f"{self._source}: metadata key {key} is {_shown(value)}, expected {expected}")


def _shown(value: MetadataValue) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype} numbers"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
