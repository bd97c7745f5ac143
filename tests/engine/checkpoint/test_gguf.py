from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import TinyGGUF, write_tiny_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.checkpoint.convert import convert_checkpoint
from nibble.engine.checkpoint.errors import CheckpointError, GGUFError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.source import open_source


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, type_number: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_number) + value


def tensor(name: str, dims: tuple[int, ...], type_number: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_number, offset)


def gguf_bytes(
    pairs: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, alignment: int = 32
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def open_bytes(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def open_(content: bytes) -> GGUFFile:
        (tmp_path / "x.gguf").write_bytes(content)
        return GGUFFile(tmp_path / "x.gguf")

    return open_


def test_reads_every_kind_of_value(open_bytes: Callable[[bytes], GGUFFile]) -> None:
    scalars = [(0, "B", 200), (1, "b", -3), (2, "H", 60000), (3, "h", -300), (4, "I", 1 << 31), (5, "i", -70000)]
    scalars += [(10, "Q", 1 << 63), (11, "q", -(1 << 62)), (12, "d", 0.1)]
    pairs = [pair(f"n{kind}", kind, struct.pack("<" + fmt, value)) for kind, fmt, value in scalars]
    pairs += [pair("f32", 6, struct.pack("<f", 0.5)), pair("yes", 7, b"\1"), pair("text", 8, string("grün"))]
    pairs += [pair("words", 9, struct.pack("<IQ", 8, 3) + string("a") + string("") + string("日本"))]
    pairs += [pair("ints", 9, struct.pack("<IQ3i", 5, 3, -1, 0, 7)), pair("none", 9, struct.pack("<IQ", 4, 0))]
    metadata = open_bytes(gguf_bytes(pairs, [])).metadata
    for kind, _, value in scalars:
        assert metadata[f"n{kind}"] == value
    assert (metadata.number("f32"), metadata.boolean("yes"), metadata.string("text")) == (0.5, True, "grün")
    assert metadata.strings("words") == ["a", "", "日本"]
    ints, none = metadata.numbers("ints"), metadata.numbers("none")
    assert ints is not None
    assert none is not None
    assert (ints.tolist(), none.tolist()) == ([-1, 0, 7], [])


@pytest.mark.parametrize("version", [2, 3])
def test_reads_tensors_with_a_stated_alignment(open_bytes: Callable[[bytes], GGUFFile], version: int) -> None:
    values = np.arange(6, dtype=np.float32)
    pairs = [pair("general.alignment", 4, struct.pack("<I", 128))]
    content = gguf_bytes(pairs, [tensor("w", (3, 2), 0, 128)], bytes(128) + values.tobytes(), version, 128)
    file = open_bytes(content)
    np.testing.assert_array_equal(file.dequantized("w"), values.reshape(2, 3))
    np.testing.assert_array_equal(file.dequantized("w", slice(1, 2)), values[None, 3:])


def test_agrees_with_the_gguf_package_on_a_whole_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", TinyGGUF(tied=False, attention_bias=True, kind="Q4_0"))
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for their_tensor in theirs.tensors:
        expected = gguf.quants.dequantize(np.array(their_tensor.data), their_tensor.tensor_type)
        np.testing.assert_array_equal(ours.dequantized(their_tensor.name), expected)
    stated = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(ours.metadata) == set(stated)
    for key, field in stated.items():
        value = ours.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()


F32_4 = tensor("w", (4,), 0, 0)
MALFORMED = {
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(64), "begins with b'\\x89PNG', not with b'GGUF'"),
    "header cut": (b"GGUF\3\0\0\0\1", "do not fit in the 1 bytes that are left"),
    "version 1": (gguf_bytes([], [], version=1), "GGUF version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata pairs do not fit"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors do not fit"),
    "long key": (gguf_bytes([struct.pack("<QI", 1 << 63, 0) + b"\0" * 9], []), "metadata pair 0: 9223372036854775808"),
    "long string": (gguf_bytes([pair("k", 8, struct.pack("<Q", 999))], []), "metadata key 'k': 999 bytes"),
    "long array": (gguf_bytes([pair("k", 9, struct.pack("<IQ", 12, 1 << 61))], []), "key 'k': 2305843009213693952 arr"),
    "long list": (gguf_bytes([pair("k", 9, struct.pack("<IQ", 8, 1 << 61))], []), "2305843009213693952 strings"),
    "nested array": (gguf_bytes([pair("k", 9, struct.pack("<IQ", 9, 0))], []), "arrays of arrays"),
    "value type": (gguf_bytes([pair("k", 13, bytes(8))], []), "metadata key 'k': unknown value type 13"),
    "boolean": (gguf_bytes([pair("k", 7, b"\2")], []), "a boolean is 2"),
    "not UTF-8": (gguf_bytes([pair("k", 8, string(b"\xff\xfe"))], []), "'k': a string is not UTF-8"),
    "key twice": (gguf_bytes([pair("k", 7, b"\1")] * 2, []), "'k': the key occurs twice"),
    "alignment 3": (gguf_bytes([pair("general.alignment", 4, b"\3\0\0\0")], []), "general.alignment is 3, expected a"),
    "alignment text": (gguf_bytes([pair("general.alignment", 8, string("x"))], []), "is 'x', expected one integer"),
    "no dimension": (gguf_bytes([], [tensor("w", (), 0, 0), bytes(40)]), "tensor 'w': it has 0 dimensions"),
    "5 dimensions": (gguf_bytes([], [tensor("w", (1,) * 5, 0, 0)]), "tensor 'w': it has 5 dimensions"),
    "zero size": (gguf_bytes([], [tensor("w", (0, 4), 0, 0)]), "'w': the shape (4, 0) makes no sense"),
    "overflow": (gguf_bytes([], [tensor("w", (1 << 63, 1 << 63), 0, 0)]), "makes no sense"),
    "tensor type": (gguf_bytes([], [tensor("w", (4,), 4, 0)]), "'w': unknown tensor type 4"),
    "ragged row": (gguf_bytes([], [tensor("w", (33,), 2, 0)], bytes(64)), "rows of 33 are no multiple of the 32"),
    "misaligned": (gguf_bytes([], [tensor("w", (4,), 0, 4)], bytes(64)), "'w': its offset 4 is not a multiple of"),
    "past the end": (gguf_bytes([], [F32_4], bytes(15)), "'w': it ends at byte 80, but the file has 79"),
    "far offset": (gguf_bytes([], [tensor("w", (4,), 0, 1 << 62)], bytes(16)), "is the file truncated?"),
    "overlap": (gguf_bytes([], [tensor("v", (64,), 0, 0), F32_4], bytes(256)), "overlaps that of"),
    "long name": (gguf_bytes([], [tensor("w" * 257, (4,), 0, 0)], bytes(64)), "its name has 257 characters, the limit"),
    "strange name": (
        gguf_bytes([], [tensor("w\x1b[2J", (4,), 0, 0)], bytes(64)),
        "'w\\x1b[2J': its name has characters",
    ),
    "name twice": (gguf_bytes([], [F32_4, F32_4], bytes(64)), "tensor 'w': the name occurs twice"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_saying_where(name: str, open_bytes: Callable[[bytes], GGUFFile]) -> None:
    content, message = MALFORMED[name]
    with pytest.raises(GGUFError) as caught:
        open_bytes(content)
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.gguf: ")
    assert "\n" not in str(caught.value)


def test_an_empty_a_missing_and_an_unsupported_file_are_refused(
    tmp_path: Path, open_bytes: Callable[[bytes], GGUFFile]
) -> None:
    with pytest.raises(GGUFError, match="empty"):
        open_bytes(b"")
    with pytest.raises(SourceError, match="No such file"):
        GGUFFile(tmp_path / "nowhere.gguf")
    file = open_bytes(gguf_bytes([], [tensor("w", (256,), 10, 0)], bytes(84)))
    with pytest.raises(UnsupportedModelError, match="tensor w is Q2_K; supported are F32"):
        file.dequantized("w")
    with pytest.raises(GGUFError, match="tensor v is missing"):
        file.blocks("v")


def test_numbers_of_the_wrong_kind_are_refused_by_key(open_bytes: Callable[[bytes], GGUFFile]) -> None:
    metadata = open_bytes(gguf_bytes([pair("yes", 7, b"\1"), pair("text", 8, string("long" * 99))], [])).metadata
    with pytest.raises(GGUFError, match="metadata key yes is True, expected one integer"):
        metadata.integer("yes")
    with pytest.raises(GGUFError, match=r"key text is 'longlong.*\.\.\., expected an array of strings"):
        metadata.strings("text")
    assert metadata.number("absent") is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    directory = tmp_path_factory.mktemp("fuzz")
    spec = TinyGGUF(num_heads=1, num_kv_heads=1, hidden_size=32, intermediate_size=32, num_layers=1, rope_freqs=True)
    return write_tiny_gguf(directory / "tiny.gguf", spec).read_bytes(), directory


def convert(content: bytes, directory: Path) -> CheckpointError | None:
    path = directory / "mutated.gguf"
    path.write_bytes(content)
    try:
        convert_checkpoint(open_source(path), directory, lambda stage, done: None)
    except CheckpointError as error:
        return error
    return None


@settings(max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_bytes_give_a_model_or_a_checkpoint_error(
    tiny: tuple[bytes, Path], flips: list[tuple[float, int]]
) -> None:
    content, directory = tiny
    data = bytearray(content)
    header_bytes = content.index(b"token_embd.weight") + 1200  # where a flip means something other than a weight
    for place, value in flips:
        data[int(place * header_bytes)] = value
    error = convert(bytes(data), directory)
    assert error is None or "mutated.gguf" in str(error)


@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), tail=st.binary(max_size=40))
def test_a_truncated_file_is_a_checkpoint_error(tiny: tuple[bytes, Path], share: float, tail: bytes) -> None:
    content, directory = tiny
    error = convert(content[: int(share * (len(content) - 40))] + tail, directory)
    assert isinstance(error, CheckpointError)
