from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.checkpoint.errors import ConversionError, SafetensorsError
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile, read_metadata, write_safetensors
from nibble.engine.checkpoint.schema import TensorSpec

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": np.arange(5, dtype=np.float32),
    "b.values": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "b.scales": np.linspace(0, 1, 16, dtype=np.float16).reshape(2, 8),
    "c": np.arange(64, dtype=np.uint8),
    "d": np.ones((1, 1), np.float32),
}
SPECS = {
    name: TensorSpec({"float32": "F32", "int8": "I8", "float16": "F16", "uint8": "U8"}[array.dtype.name], array.shape)
    for name, array in ARRAYS.items()
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / "x.safetensors", SPECS, {"note": "grün"}, reversed(ARRAYS.items()))
    return tmp_path / "x.safetensors"


def test_what_was_written_is_read_back_as_aligned_read_only_views(written: Path) -> None:
    file = SafetensorsFile(written)
    assert file.specs == SPECS
    assert file.metadata == read_metadata(written) == {"note": "grün"}
    for name, array in ARRAYS.items():
        view = file.array(name)
        np.testing.assert_array_equal(view, array)
        assert view.dtype == array.dtype
        assert view.ctypes.data % 64 == 0
        assert not view.flags.writeable
        assert not view.flags.owndata


def test_the_file_is_valid_for_the_safetensors_package(written: Path) -> None:
    with safetensors.safe_open(written, "numpy") as file:
        assert file.metadata() == {"note": "grün"}
        assert {name for name in file.keys() if not name.startswith("padding.")} == set(ARRAYS)  # noqa: SIM118  not a dict
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_an_array_outlives_its_file_object(written: Path) -> None:
    view = SafetensorsFile(written).array("c")
    written.unlink()
    assert view.tolist() == list(range(64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(5, np.float64)}, "tensor a is float64"),
        ({"a": np.zeros((5, 1), np.float32)}, "expected TensorSpec"),
        ({"a": ARRAYS["a"]}, "tensors were not written"),
    ],
)
def test_a_writer_that_breaks_its_plan_is_a_bug(
    tmp_path: Path, arrays: dict[str, npt.NDArray[Any]], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        write_safetensors(tmp_path / "x.safetensors", SPECS, {}, arrays.items())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_a_conversion_error(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("/dev/full")
    with pytest.raises(ConversionError, match=r"x\.safetensors: cannot be written: No space left"):
        write_safetensors(tmp_path / "x.safetensors", SPECS, {}, ARRAYS.items())


def raw_file(entries: Any, data: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else msgspec.json.encode(entries)
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: list[int] | None = None, start: int = 0, end: int = 16) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [start, end]}}


TWICE = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[16,32]},' + msgspec.json.encode(entry(end=16))[1:]

MALFORMED = {
    "empty": (b"", "empty"),
    "short": (b"\0" * 7, "only 7 bytes"),
    "long header": (struct.pack("<Q", 1 << 60) + bytes(64), "does not fit the file of 72"),
    "not JSON": (raw_file(b"{'a': 1}"), "not valid JSON"),
    "not an object": (raw_file([1, 2]), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    "metadata": (raw_file({"__metadata__": {"a": 1}}), "__metadata__: "),
    "dtype": (raw_file(entry("F8_E4M3")), "tensor w: dtype F8_E4M3, expected one of F32"),
    "overlap": (raw_file(entry() | {"v": entry(start=8, end=24)["w"]}), "tensor v: its data overlaps that of w"),
    "deep": (raw_file(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "past the end": (raw_file(entry(shape=[40], end=160)), "tensor w: bytes 0 to 160 are not within the 64"),
    "backwards": (raw_file(entry(start=16, end=0)), "tensor w: bytes 16 to 0"),
    "before the start": (raw_file(entry(start=-16, end=0)), "tensor w: bytes -16 to 0"),
    "size": (raw_file(entry(shape=[5])), "tensor w: 16 bytes do not hold F32 [5]"),
    "negative shape": (raw_file(entry(shape=[-2, -2])), "tensor w: 16 bytes do not hold F32 [-2, -2]"),
    "huge shape": (raw_file(entry(shape=[1 << 62, 1 << 62, 4])), "tensor w: 16 bytes do not hold"),
    "many dimensions": (raw_file(entry(shape=[1] * 9, end=4)), "tensor w: 9 dimensions, the limit is 8"),
    "long entry": (raw_file(entry(shape=[1 << 62] * 50)), "bytes describe it, the limit is 1000"),
    "long name": (raw_file({"w" * 257: entry()["w"]}), "its name has 257 characters, the limit is 256"),
    "strange name": (raw_file({"w\x1b[2J": entry()["w"]}), "tensor 'w\\x1b[2J': its name has characters that cannot"),
    "name twice": (raw_file(TWICE), "the header has a name twice"),
    "gap": (raw_file(entry(start=16, end=32)), "bytes 0 to 16 of the data belong to no tensor"),
    "tail": (raw_file(entry(end=16)), "bytes 16 to 64 of the data belong to no tensor"),
    "missing field": (raw_file({"w": {"dtype": "F32"}}), "tensor w: Object missing required field"),
    "unknown field": (raw_file({"w": {**entry()["w"], "x": 1}}), "tensor w: Object contains unknown field"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_saying_where(name: str, tmp_path: Path) -> None:
    content, message = MALFORMED[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert "x.safetensors: " in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), max_size=4), cut=st.integers(0, 900))
def test_damaged_files_give_arrays_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_safetensors(path, SPECS, {"note": "x"}, ARRAYS.items())
    content = bytearray(path.read_bytes())
    for place, value in flips:
        content[place % len(content)] = value
    path.write_bytes(content[: len(content) - cut if cut < 100 else None])
    try:
        file = SafetensorsFile(path)
    except SafetensorsError:
        return
    for name, spec in file.specs.items():
        if 0 not in spec.shape:
            assert file.array(name).copy().shape == spec.shape
