"""A safetensors file, read as views of a memory map and written one tensor at a time.

The `safetensors` package copies each tensor into memory when asked for numpy arrays, needs all of them at once to
write, and does not align them; hence this module. Files are ordinary safetensors, with one habit of ours: every tensor
begins on a multiple of 64 bytes (a cache line, and what vector loads and GPU copies like). The JSON header is padded
with spaces to that end, and a tensor of another size is followed by a U8 tensor `padding.{n}`, since the format allows
no gaps.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

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

ALIGNMENT = 64  # bytes
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit
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

    Any safetensors file, ours or not: where tensors begin is the caller's to check.
    """

    def __init__(self, path: Path) -> None:
        """Raises SafetensorsError for a file that is not well-formed."""
        self._map = _map_file(path)
        header, data_start = _read_header(self._map, path.name)
        self.metadata = _pop_metadata(header, path.name)
        self.specs: dict[str, TensorSpec] = {}
        self._starts: dict[str, int] = {}
        for name, raw in header.items():
            entry = _read_entry(raw, len(self._map) - data_start, f"{path.name}: tensor {name[:100]}")
            if not name.startswith(_PADDING_PREFIX):
                self.specs[name] = TensorSpec(entry.dtype, entry.shape)
                self._starts[name] = data_start + entry.data_offsets[0]
        self._check_overlaps(path.name)

    def _check_overlaps(self, source: str) -> None:
        previous_end, previous_name = 0, ""
        for name, start in sorted(self._starts.items(), key=lambda item: item[1]):
            if start < previous_end:
                raise SafetensorsError(
                    f"{source}: tensor {name[:100]}: its data overlaps that of {previous_name[:100]}"
                )
            previous_end, previous_name = start + _num_bytes(self.specs[name]), name

    def array(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the map."""
        spec = self.specs[name]
        count = math.prod(spec.shape)
        flat = np.frombuffer(self._map, dtype=_DTYPES[spec.dtype], count=count, offset=self._starts[name])
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
    try:
        header = msgspec.json.decode(data[8 : 8 + header_bytes], type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SafetensorsError(f"{source}: the header is not valid JSON: {error}") from None
    return header, 8 + header_bytes


def _pop_metadata(header: dict[str, msgspec.Raw], source: str) -> dict[str, str]:
    try:
        return msgspec.json.decode(header.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SafetensorsError(f"{source}: __metadata__: {error}") from None


def _read_entry(raw: msgspec.Raw, data_bytes: int, reading: str) -> _Entry:
    try:
        entry = msgspec.json.decode(raw, type=_Entry)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SafetensorsError(f"{reading}: {error}") from None
    if entry.dtype not in _DTYPES:
        raise SafetensorsError(f"{reading}: dtype {entry.dtype}, expected one of {', '.join(_DTYPES)}")
    start, end = entry.data_offsets
    if not 0 <= start <= end <= data_bytes:
        raise SafetensorsError(f"{reading}: bytes {start} to {end} are not within the {data_bytes} of the data")
    if any(size < 0 for size in entry.shape) or _num_bytes(TensorSpec(entry.dtype, entry.shape)) != end - start:
        raise SafetensorsError(f"{reading}: {end - start} bytes do not hold {entry.dtype} {list(entry.shape)}")
    return entry
