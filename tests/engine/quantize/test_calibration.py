"""Calibration text: files that are read, and those that are refused with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizer import write_tiny_tokenizer

from nibble.engine.quantize.calibration import DEFAULT_TEXT, MIN_TOKENS, read_texts, token_sequences
from nibble.engine.quantize.errors import CalibrationError


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    write_tiny_tokenizer(tmp_path)
    return tmp_path / "tokenizer.json"


def test_documents_of_both_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "því"}]
    lines = [json.dumps({"text": "first\nline"}), "", json.dumps({"messages": messages}, ensure_ascii=False)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one\ntwo\n"]
    assert read_texts(tmp_path / "b.jsonl") == ["first\nline", "why?\n\nþví"]


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "a"}', '{"text": 3}', '{"messages": []}', '{"messages": ["a"]}'])
def test_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"texts\.jsonl, line 2"):
        read_texts(path)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("a.txt", "missing.txt"):
        with pytest.raises(CalibrationError, match=name):
            read_texts(tmp_path / name)


def test_sequences_come_from_all_over_the_text(tokenizer_file: Path) -> None:
    texts = ["a" * 6000, "b" * 6000]
    few = token_sequences(texts, tokenizer_file, 4, 100)
    assert few.shape == (4, 100)
    assert few[0, 0] != few[-1, 0], "both documents are in it"
    everything = token_sequences(texts, tokenizer_file, 1_000_000, 100)
    assert len({row for row in range(len(everything))}) == len(everything) > 4


def test_short_text_gives_one_short_sequence_and_less_is_refused(tokenizer_file: Path) -> None:
    ids = token_sequences(["x y " * MIN_TOKENS], tokenizer_file, 8, 1 << 20)
    assert ids.shape[0] == 1
    with pytest.raises(CalibrationError, match=f"the least is {MIN_TOKENS}"):
        token_sequences(["x y"], tokenizer_file, 8, 128)


def test_text_that_comes_with_nibble_fills_a_dozen_sequences(tokenizer_file: Path) -> None:
    texts = read_texts(DEFAULT_TEXT)
    assert token_sequences(texts, tokenizer_file, 128, 512).shape[0] >= 12
