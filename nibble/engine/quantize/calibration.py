"""Calibration text as token sequences: a plain text file, JSON lines, or the text that comes with Nibble."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nibble.engine.quantize.errors import CalibrationError

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")  # written for this purpose, in the public domain (CC0)
MIN_TOKENS = 512


def read_texts(path: Path) -> list[str]:
    """The documents of a file: one of a `.txt`, one a line of a `.jsonl` (its `text`, or its `messages`' contents).

    Raises CalibrationError.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [content]
    lines = content.split("\n")
    return [_document(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _document(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: is not JSON: {error}") from None
    if isinstance(value, dict):
        if isinstance(value.get("text"), str):
            return str(value["text"])
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            contents = [message.get("content") for message in messages]
            if all(isinstance(content, str) for content in contents):
                return "\n\n".join(contents)
    raise CalibrationError(f"{where}: expected an object with a string `text`, or `messages` with string contents")


def token_sequences(texts: list[str], tokenizer_file: Path, num_sequences: int, length: int) -> Tensor:
    """At most num_sequences of `length` tokens, from places all over the texts: int64 (B, T).

    A text of fewer tokens than one sequence gives one shorter sequence. Raises CalibrationError for less than
    MIN_TOKENS tokens.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int64)
    if len(ids) < MIN_TOKENS:
        raise CalibrationError(f"the text has {len(ids)} tokens, the least is {MIN_TOKENS}")
    length = min(length, len(ids))
    windows = ids[: len(ids) // length * length].view(-1, length)
    count = min(num_sequences, len(windows))
    return windows[torch.arange(count) * len(windows) // count]
