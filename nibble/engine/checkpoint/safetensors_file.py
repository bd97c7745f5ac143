"""A safetensors file, read as views of a memory map and written one tensor at a time.

The `safetensors` package copies each tensor into memory when asked for numpy arrays, needs all of them at once to
write, and does not align them; hence this module. Files are ordinary safetensors, with one habit of ours: every tensor
begins on a multiple of 64 bytes (a cache line, and what vector loads and GPU copies like). The JSON header is padded
with spaces to that end, and a tensor of another size is followed by a U8 tensor `padding.{n}`, since the format allows
no gaps.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, SafetensorsError
from nibble.engine.checkpoint.schema import TensorSpec
from nibble.engine.checkpoint.tensor_names import name_problem

ALIGNMENT = 64  # bytes
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
MAX_DIMENSIONS = 8  # far from NumPy's 64
_MAX_ENTRY_BYTES = 1000  # of JSON: eight dimensions of 20 digits take 300
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the bits: NumPy has no such type
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("u1"),
}
_PADDING_PREFIX = "padding."


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """A memory-mapped file. The map lives as long as this object or any array made from it.

    Any safetensors file, ours or not: where tensors begin (`starts`, in bytes) is the caller's to check.
    """

    def __init__(self, path: Path) -> None:
        """Raises SafetensorsError for a file that is not well-formed."""
        self._map = _map_file(path)
        header, data_start = _read_header(self._map, path.name)
        self.metadata = _pop_metadata(header, path.name)
        entries = {name: _read_entry(name, raw, len(self._map) - data_start, path.name) for name, raw in header.items()}
        _check_extents(entries, len(self._map) - data_start, path.name)
        entries = {name: entry for name, entry in entries.items() if not name.startswith(_PADDING_PREFIX)}
        self.specs = {name: TensorSpec(entry.dtype, entry.shape) for name, entry in entries.items()}
        self.starts = {name: data_start + entry.data_offsets[0] for name, entry in entries.items()}

    def array(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the map."""
        spec = self.specs[name]
        count = math.prod(spec.shape)
        flat = np.frombuffer(self._map, dtype=_DTYPES[spec.dtype], count=count, offset=self.starts[name])
        return flat.reshape(spec.shape)


def read_metadata(path: Path) -> dict[str, str]:
    """The free-form strings in any safetensors file's header, aligned or not. Raises SafetensorsError."""
    header, _ = _read_header(_map_file(path), path.name)
    return _pop_metadata(header, path.name)


def write_safetensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    arrays: Iterable[tuple[str, npt.NDArray[Any]]],
) -> None:
    """Write `arrays`, in whatever order they come, at the places planned for `specs`, and sync them to the disk.

    Each array must have its spec's dtype and shape, and each spec its array. Raises ConversionError where the disk does
    not hold it.
    """
    header, starts, total_bytes = _plan(specs, metadata)
    missing = set(specs)
    try:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(total_bytes)
            for name, array in arrays:
                spec = specs[name]
                assert name in missing, f"tensor {name} is written twice"
                assert (array.dtype, array.shape) == (_DTYPES[spec.dtype], spec.shape), (
                    f"tensor {name} is {array.dtype} {array.shape}, expected {spec}"
                )
                missing.remove(name)
                file.seek(starts[name])
                file.write(np.ascontiguousarray(array).data)
            assert not missing, f"tensors were not written: {sorted(missing)}"
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written: {error.strerror}") from error


def _plan(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header's bytes, each tensor's place in the file, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        end = offset + _num_bytes(spec)
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, end)}
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if offset > end:
            padding = f"{_PADDING_PREFIX}{len(entries)}"
            entries[padding] = {"dtype": "U8", "shape": (offset - end,), "data_offsets": (end, offset)}
    text = msgspec.json.encode(entries)
    data_start = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    header = struct.pack("<Q", data_start - 8) + text.ljust(data_start - 8)
    return header, {name: data_start + entries[name]["data_offsets"][0] for name in specs}, data_start + offset


def _num_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * _DTYPES[spec.dtype].itemsize


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise SafetensorsError(f"{path}: the file is empty") from None
    except OSError as error:
        raise SafetensorsError(f"{path}: cannot be read: {error.strerror}") from error


def _read_header(data: mmap.mmap, source: str) -> tuple[dict[str, msgspec.Raw], int]:
    if len(data) < 8:
        raise SafetensorsError(f"{source}: the file has only {len(data)} bytes")
    (header_bytes,) = struct.unpack_from("<Q", data, 0)
    if header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise SafetensorsError(f"{source}: the header of {header_bytes} bytes does not fit the file of {len(data)}")
    text = data[8 : 8 + header_bytes]
    try:
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        num_names = json.loads(text, object_pairs_hook=len)  # repeated ones included
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise SafetensorsError(f"{source}: the header is not valid JSON: {error}") from None
    if len(header) < num_names:
        raise SafetensorsError(f"{source}: the header has a name twice")
    return header, 8 + header_bytes


def _pop_metadata(header: dict[str, msgspec.Raw], source: str) -> dict[str, str]:
    try:
        return msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SafetensorsError(f"{source}: __metadata__: {error}") from None


def _read_entry(name: str, raw: msgspec.Raw, data_bytes: int, source: str) -> _Entry:
    problem = name_problem(name)
    if problem:
        raise SafetensorsError(f"{source}: tensor {name[:100]!r}: {problem}")
    reading = f"{source}: tensor {name}"
    if len(bytes(raw)) > _MAX_ENTRY_BYTES:
        raise SafetensorsError(f"{reading}: {len(bytes(raw))} bytes describe it, the limit is {_MAX_ENTRY_BYTES}")
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SafetensorsError(f"{reading}: {error}") from None
    if entry.dtype not in _DTYPES:
        raise SafetensorsError(f"{reading}: dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise SafetensorsError(f"{reading}: {len(entry.shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    start, end = entry.data_offsets
    if not 0 <= start <= end <= data_bytes:
        raise SafetensorsError(f"{reading}: bytes {start} to {end} are not within the {data_bytes} of the data")
    if any(size < 0 for size in entry.shape) or _num_bytes(TensorSpec(entry.dtype, entry.shape)) != end - start:
        raise SafetensorsError(f"{reading}: {end - start} bytes do not hold {entry.dtype} {list(entry.shape)}")
    return entry


def _check_extents(entries: Mapping[str, _Entry], data_bytes: int, source: str) -> None:
    """Raise unless every byte belongs to one tensor, as the format demands."""
    previous_end, previous_name = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if start < previous_end:
            raise SafetensorsError(f"{source}: tensor {name}: its data overlaps that of {previous_name}")
        if start > previous_end:
            raise _unowned(source, previous_end, start)
        previous_end, previous_name = end, name
    if previous_end < data_bytes:
        raise _unowned(source, previous_end, data_bytes)


def _unowned(source: str, start: int, end: int) -> SafetensorsError:
    return SafetensorsError(f"{source}: bytes {start} to {end} of the data belong to no tensor")
