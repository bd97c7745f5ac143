"""Reads GGUF files, versions 2 and 3, little-endian: metadata, tensor directory, tensors in a memory map.

The file is untrusted. Every count, length, offset and type number is checked against the file's size before it is
used, so that a truncated or hostile file is a GGUFError that names the key or tensor, never a crash, an over-read or an
allocation larger than the file. What a tensor means is not known here.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nibble.engine.checkpoint.errors import GGUFError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.ggml_types import DEQUANTIZABLE, GGML_TYPES, Bytes, Floats, GGMLType, dequantize
from nibble.engine.checkpoint.metadata import Metadata, MetadataValue
from nibble.engine.checkpoint.tensor_names import name_problem

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20  # a sane bound: writers use 32 or 64
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALAR_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SCALAR_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MIN_PAIR_BYTES = 8 + 4 + 1  # key length, value type, the shortest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, dimension count, one dimension, type, offset


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor directory. `shape` is numpy's order (GGUF writes the fastest dimension first)."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLType
    start: int  # absolute, in bytes
    num_bytes: int


class GGUFFile:
    """A memory-mapped GGUF file. The map lives as long as this object or any array made from it."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError where the file cannot be opened, GGUFError where it is malformed."""
        self.path = path
        self._map = _map_file(path)
        cursor = _Cursor(self._map, path.name)
        tensor_count, pair_count = _read_header(cursor)
        self.metadata = Metadata(_read_metadata(cursor, pair_count), path.name)
        self.tensors: Mapping[str, GGUFTensor] = _read_tensor_directory(cursor, tensor_count, self._alignment())

    def _alignment(self) -> int:
        key = "general.alignment"
        alignment = self.metadata.integer(key)
        if alignment is None:
            return DEFAULT_ALIGNMENT
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.metadata.out_of_range(key, f"a power of two up to {MAX_ALIGNMENT}")
        return alignment

    def tensor(self, name: str) -> GGUFTensor:
        """Raises GGUFError where the file has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise GGUFError(f"{self.path.name}: tensor {name} is missing") from None

    def blocks(self, name: str) -> Bytes:
        """The stored bytes, read-only and not copied: uint8 (rows, blocks per row, bytes per block)."""
        tensor = self.tensor(name)
        flat = np.frombuffer(self._map, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.start)
        rows = math.prod(tensor.shape[:-1])
        return flat.reshape(rows, tensor.shape[-1] // tensor.kind.block_values, tensor.kind.block_bytes)

    def dequantized(self, name: str, rows: slice = slice(None)) -> Floats:
        """The tensor, or some rows of its first axis, as new float32. Raises UnsupportedModelError for other types."""
        tensor = self.tensor(name)
        if tensor.kind.name not in DEQUANTIZABLE:
            raise UnsupportedModelError(
                f"{self.path.name}: tensor {name} is {tensor.kind.name}; supported are {', '.join(DEQUANTIZABLE)}"
            )
        blocks = self.blocks(name)  # (rows, blocks, bytes)
        blocks = blocks.reshape(*tensor.shape[:-1], *blocks.shape[1:])[rows if len(tensor.shape) > 1 else ...]
        values = dequantize(blocks.reshape(-1, blocks.shape[-2] * blocks.shape[-1]), tensor.kind)
        return values.reshape(*blocks.shape[:-2], tensor.shape[-1])


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise GGUFError(f"{path.name}: the file is empty") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """A position in the file that never passes its end. `reading` says what is being read, for errors."""

    def __init__(self, data: mmap.mmap, source: str) -> None:
        self.data = data
        self.position = 0
        self.reading = "header"
        self._source = source

    def error(self, problem: str) -> GGUFError:
        return GGUFError(f"{self._source}: {self.reading}: {problem}")

    def expect(self, count: int, item_bytes: int, what: str) -> None:
        """Raise unless `count` items of at least `item_bytes` fit in the rest of the file."""
        left = len(self.data) - self.position
        if count * item_bytes > left:
            raise self.error(f"{count} {what} do not fit in the {left} bytes that are left of the file")

    def take(self, format_: str) -> Any:
        """One little-endian number."""
        size = struct.calcsize("<" + format_)
        self.expect(size, 1, "bytes")
        (value,) = struct.unpack_from("<" + format_, self.data, self.position)
        self.position += size
        return value

    def take_bytes(self) -> bytes:
        """A 64-bit length and that many bytes."""
        length = self.take("Q")
        self.expect(length, 1, "bytes of a string")
        self.position += length
        return self.data[self.position - length : self.position]

    def take_string(self) -> str:
        try:
            return self.take_bytes().decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a string is not UTF-8 ({error.reason})") from None


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != MAGIC:
        raise cursor.error(f"the file begins with {cursor.data[:4]!r}, not with {MAGIC!r}: not a GGUF file")
    cursor.position = 4
    version = cursor.take("I")
    if version not in SUPPORTED_VERSIONS:
        if version and version & 0xFFFF == 0:
            raise cursor.error("the file is big-endian, which is not supported")
        raise cursor.error(f"GGUF version {version} is not supported, only {SUPPORTED_VERSIONS}")
    tensor_count, pair_count = cursor.take("Q"), cursor.take("Q")
    cursor.expect(pair_count, _MIN_PAIR_BYTES, "metadata pairs")
    cursor.expect(tensor_count, _MIN_TENSOR_BYTES, "tensors")
    return tensor_count, pair_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    values: dict[str, MetadataValue] = {}
    for index in range(count):
        cursor.reading = f"metadata pair {index}"
        key = cursor.take_string()
        cursor.reading = f"metadata key {key[:100]!r}"
        if key in values:
            raise cursor.error("the key occurs twice")
        values[key] = _read_value(cursor, cursor.take("I"))
    return values


def _read_value(cursor: _Cursor, type_number: int) -> MetadataValue:
    if type_number == _STRING:
        return cursor.take_string()
    if type_number == _ARRAY:
        return _read_array(cursor)
    value: int | float = cursor.take(_scalar_format(cursor, type_number))
    if type_number != _BOOL:
        return value
    if value > 1:
        raise cursor.error(f"a boolean is {value}")
    return bool(value)


def _read_array(cursor: _Cursor) -> MetadataValue:
    type_number, count = cursor.take("I"), cursor.take("Q")
    if type_number == _ARRAY:
        raise cursor.error("arrays of arrays are not supported")
    if type_number == _STRING:
        cursor.expect(count, 8, "strings")
        return [cursor.take_string() for _ in range(count)]
    item_bytes = struct.calcsize(_scalar_format(cursor, type_number))
    cursor.expect(count, item_bytes, "array items")
    items = np.frombuffer(cursor.data, dtype=_SCALAR_DTYPES[type_number], count=count, offset=cursor.position)
    cursor.position += count * item_bytes
    return items


def _scalar_format(cursor: _Cursor, type_number: int) -> str:
    try:
        return _SCALAR_FORMATS[type_number]
    except KeyError:
        raise cursor.error(f"unknown value type {type_number}") from None


def _read_tensor_directory(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    entries: dict[str, tuple[tuple[int, ...], GGMLType, int]] = {}
    for index in range(count):
        cursor.reading = f"tensor {index}"
        name = cursor.take_string()
        cursor.reading = f"tensor {name[:100]!r}"
        if name in entries:
            raise cursor.error("the name occurs twice")
        problem = name_problem(name)
        if problem:
            raise cursor.error(problem)
        entries[name] = _read_tensor_entry(cursor, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        num_bytes = math.prod(shape) // kind.block_values * kind.block_bytes
        tensors[name] = GGUFTensor(name, shape, kind, data_start + offset, num_bytes)
    _check_extents(cursor, tensors)
    return tensors


def _read_tensor_entry(cursor: _Cursor, alignment: int) -> tuple[tuple[int, ...], GGMLType, int]:
    num_dimensions = cursor.take("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"it has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reversed([cursor.take("Q") for _ in range(num_dimensions)]))
    type_number, offset = cursor.take("I"), cursor.take("Q")
    if type_number not in GGML_TYPES:
        raise cursor.error(f"unknown tensor type {type_number}")
    kind = GGML_TYPES[type_number]
    if 0 in shape or math.prod(shape) > 1 << 62:
        raise cursor.error(f"the shape {shape} makes no sense")
    if shape[-1] % kind.block_values:
        raise cursor.error(f"its rows of {shape[-1]} are no multiple of the {kind.block_values} of a {kind.name} block")
    if offset % alignment:
        raise cursor.error(f"its offset {offset} is not a multiple of the alignment {alignment}")
    return shape, kind, offset


def _check_extents(cursor: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    """Raise for a tensor that passes the end of the file or overlaps another."""
    previous_end, previous_name = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        cursor.reading = f"tensor {tensor.name[:100]!r}"
        end = tensor.start + tensor.num_bytes
        if end > len(cursor.data):
            raise cursor.error(f"it ends at byte {end}, but the file has {len(cursor.data)}: is the file truncated?")
        if tensor.start < previous_end:
            raise cursor.error(f"its data overlaps that of {previous_name[:100]!r}")
        previous_end, previous_name = end, tensor.name
