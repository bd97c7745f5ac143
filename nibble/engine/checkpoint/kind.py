"""What a path that a user names as a model is, told without reading more than a header."""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path

from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.checkpoint.gguf import MAGIC
from nibble.engine.checkpoint.native import METADATA_KEY, WEIGHTS_FILE
from nibble.engine.checkpoint.safetensors_file import read_metadata

_SUPPORTED = "supported are a GGUF file, a Hugging Face directory and a directory that Nibble converted"


class Kind(Enum):
    GGUF = auto()  # a file
    HUGGING_FACE = auto()  # a directory, and so is
    NATIVE = auto()


def kind_of(path: Path) -> Kind:
    """Raises SourceError for what is no model, SafetensorsError for damaged weights."""
    if not path.exists():
        raise SourceError(f"{path}: there is no such file or directory")
    if not path.is_dir():
        if not _is_gguf(path):
            raise SourceError(f"{path}: is not a GGUF file; {_SUPPORTED}")
        return Kind.GGUF
    weights = path / WEIGHTS_FILE
    if weights.is_file() and METADATA_KEY in read_metadata(weights):
        return Kind.NATIVE
    if (path / "config.json").is_file():
        return Kind.HUGGING_FACE
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files:
        raise SourceError(f"{path}: is a directory; name the GGUF file in it, such as {gguf_files[0]}")
    raise SourceError(f"{path}: holds no model; {_SUPPORTED}")


def _is_gguf(path: Path) -> bool:
    """Whether a file begins like one."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
