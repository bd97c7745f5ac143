"""A Hugging Face tokenizer and chat template as the two files of a native directory."""

from __future__ import annotations

from pathlib import Path

from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.checkpoint.hf_config import write_file, write_json
from nibble.engine.checkpoint.hf_metadata import read_json


def write_hf_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json as it is; the chat template, wherever it is kept, goes into tokenizer_config.json."""
    config = source / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    template = source / "chat_template.jinja"
    if template.is_file():
        values["chat_template"] = _read_text(template)
    elif (source / "chat_template.json").is_file():
        values["chat_template"] = read_json(source / "chat_template.json").get("chat_template")
    tokenizer = read_json(source / "tokenizer.json")  # damaged ones are refused here, not by every gateway
    if not isinstance(tokenizer.get("model"), dict):
        raise SourceError(f"{source / 'tokenizer.json'}: model is missing or not an object")
    write_file(target / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    write_json(target / "tokenizer_config.json", values)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: is not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
