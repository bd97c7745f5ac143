"""From the path that a user names to a native checkpoint directory, converting a GGUF file the first time.

Conversions are kept in a cache directory under `<file stem>-<identity>`; `cache.py` sees to it that none is half there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish
from nibble.engine.checkpoint.convert import Progress, convert_gguf
from nibble.engine.checkpoint.errors import ConversionError, NativeFormatError, SourceError
from nibble.engine.checkpoint.gguf import MAGIC
from nibble.engine.checkpoint.native import METADATA_KEY, WEIGHTS_FILE, load_checkpoint
from nibble.engine.checkpoint.safetensors_file import read_metadata
from nibble.engine.checkpoint.schema import FORMAT_VERSION

FILES = (WEIGHTS_FILE, "config.json", "tokenizer.json", "tokenizer_config.json")
_SUPPORTED = "supported are a GGUF file and a directory that Nibble converted"
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 16 << 10  # 1 MiB in all: some milliseconds, however large the file
_MAX_STEM_LENGTH = 100

logger = logging.getLogger(__name__)


def resolve_checkpoint(source: Path, cache_dir: Path, progress: Progress) -> Path:
    """The native directory for `source`: itself, or where the GGUF file's conversion is (made now if need be).

    Safe with several processes at once: one converts, the others wait. Raises CheckpointError.
    """
    if source.is_dir():
        _check_native_directory(source)
        return source
    if not source.exists():
        raise SourceError(f"{source}: there is no such file or directory")
    identity = _identity(source)
    target = cache_dir / f"{source.stem[:_MAX_STEM_LENGTH]}-{identity}"
    if _is_usable(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(target, lambda: progress("waiting for another process that converts the model", 0.0)):
            if not _is_usable(target):
                _convert_into(target, source, progress)
    except OSError as error:
        raise ConversionError(f"{cache_dir}: the converted model cannot be stored: {error.strerror}") from error
    return target


def _convert_into(target: Path, source: Path, progress: Progress) -> None:
    with partial_directory(target) as directory:
        convert_gguf(source, directory, progress)
        if target.exists():  # found unusable
            shutil.rmtree(target)
        publish(directory, target)
    logger.info("source=%s converted=%s", source, target)


def _is_usable(target: Path) -> bool:
    """Whether a finished conversion is there. One that somebody damaged is made again, with a warning."""
    if not target.exists():
        return False
    try:
        load_checkpoint(target)
    except NativeFormatError as error:
        logger.warning("cached=%s is damaged and will be made again: %s", target, error)
        return False
    missing = [name for name in FILES if not (target / name).is_file()]
    if missing:
        logger.warning("cached=%s lacks %s and will be made again", target, ", ".join(missing))
    return not missing


def _check_native_directory(directory: Path) -> None:
    """Raise unless a worker and a gateway can be started on it."""
    weights = directory / WEIGHTS_FILE
    if weights.is_file() and METADATA_KEY in read_metadata(weights):
        load_checkpoint(directory)
        for name in FILES:
            if not (directory / name).is_file():
                raise SourceError(f"{directory}: {name} is missing")
        return
    gguf_files = sorted(directory.glob("*.gguf"))
    if gguf_files:
        raise SourceError(f"{directory}: is a directory; name the GGUF file in it, such as {gguf_files[0]}")
    if any(directory.glob("*.safetensors")) or (directory / "config.json").is_file():
        raise SourceError(f"{directory}: Hugging Face checkpoints are not supported yet; {_SUPPORTED}")
    raise SourceError(f"{directory}: holds no model; {_SUPPORTED}")


def _identity(source: Path) -> str:
    """A name for the content: hash of its size, time of change, samples from all over it, and our format's version.

    Hashing all of a 40 GB file at each start would take a minute.
    """
    try:
        with source.open("rb") as file:
            status = os.fstat(file.fileno())
            if file.read(len(MAGIC)) != MAGIC:
                raise SourceError(f"{source}: is not a GGUF file; {_SUPPORTED}")
            digest = hashlib.sha256(f"{FORMAT_VERSION} {status.st_size} {status.st_mtime_ns}".encode())
            for i in range(_NUM_SAMPLES):
                file.seek(max(0, status.st_size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise SourceError(f"{source}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
