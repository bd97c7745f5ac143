"""From the path that a user names to a native checkpoint directory, converting other formats the first time.

Conversions are kept in a cache directory under `<name>-<identity>`; `cache.py` sees to it that none is half there.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish
from nibble.engine.checkpoint.convert import Progress, convert_checkpoint
from nibble.engine.checkpoint.errors import ConversionError, NativeFormatError, SafetensorsError, SourceError
from nibble.engine.checkpoint.kind import Kind, kind_of
from nibble.engine.checkpoint.native import WEIGHTS_FILE, load_checkpoint
from nibble.engine.checkpoint.schema import FORMAT_VERSION
from nibble.engine.checkpoint.smooth_keys import SmoothKeySource
from nibble.engine.checkpoint.source import open_source

FILES = (WEIGHTS_FILE, "config.json", "tokenizer.json", "tokenizer_config.json")
CONVERSION_VERSION = 2  # part of the cache's key: raise it whenever a model would be converted to something better
_HUGGING_FACE_PATTERNS = ("*.json", "*.jinja", "*.safetensors")
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 16 << 10  # 1 MiB of each file: some milliseconds, however large it is
_MAX_STEM_BYTES = 100  # a file name has at most 255, and suffixes follow

logger = logging.getLogger(__name__)


def resolve_checkpoint(source: Path, cache_dir: Path, progress: Progress) -> Path:
    """The native directory for `source`: itself, or where its conversion is (made now if need be).

    Safe with several processes at once: one converts, the others wait. Raises CheckpointError.
    """
    if is_native(source):
        return source
    target = cache_dir / f"{_name_of(source)}-{_identity(source)}"
    if _is_usable(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(target, lambda: progress("waiting for another process that converts the model", 0.0)):
            if not _is_usable(target):
                shutil.rmtree(target, ignore_errors=True)
                _convert_into(target, source, progress)
    except OSError as error:
        raise ConversionError(f"{cache_dir}: the converted model cannot be stored: {error.strerror}") from error
    return target


def convert_model(source: Path, target: Path, progress: Progress) -> None:
    """Make the native directory `target`, which does not exist yet, of a model in another format: whole or not at all.

    Raises CheckpointError.
    """
    if target.exists():
        raise ConversionError(f"{target}: exists already")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target, lambda: progress("waiting for another process that converts the model", 0.0)):
            if target.exists():
                raise ConversionError(f"{target}: exists already: another process has made it meanwhile")
            _convert_into(target, source, progress)
    except OSError as error:
        raise ConversionError(f"{target}: cannot be written: {error.strerror}") from error


def _convert_into(target: Path, source: Path, progress: Progress) -> None:
    with partial_directory(target) as directory:
        convert_checkpoint(SmoothKeySource(open_source(source)), directory, progress)
        publish(directory, target)
    logger.info("source=%s converted=%s", source, target)


def _is_usable(target: Path) -> bool:
    """Whether a finished conversion is there. One that somebody damaged is made again, with a warning."""
    if not target.exists():
        return False
    try:
        load_checkpoint(target)
    except (NativeFormatError, SafetensorsError) as error:
        logger.warning("cached=%s is damaged and will be made again: %s", target, error)
        return False
    missing = [name for name in FILES if not (target / name).is_file()]
    if missing:
        logger.warning("cached=%s lacks %s and will be made again", target, ", ".join(missing))
    return not missing


def is_native(source: Path) -> bool:
    """Whether a worker and a gateway can be started on it as it is. Raises CheckpointError for what is no model."""
    if kind_of(source) is not Kind.NATIVE:
        return False
    load_checkpoint(source)
    for name in FILES:
        if not (source / name).is_file():
            raise SourceError(f"{source}: {name} is missing")
    return True


def _name_of(source: Path) -> str:
    name = source.stem if source.is_file() else source.resolve().name
    return name.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")


def _identity(source: Path) -> str:
    """A name for the content: hash of each file's size, time of change and samples from all over it, and the versions
    of our format and of conversion.

    Hashing all of a 40 GB file at each start would take a minute.
    """
    digest = hashlib.sha256(f"{FORMAT_VERSION} {CONVERSION_VERSION}".encode())
    files = [source]
    if source.is_dir():
        files = sorted(path for pattern in _HUGGING_FACE_PATTERNS for path in source.glob(pattern))
    for path in files:
        try:
            status = path.stat()
            digest.update(f" {path.name if len(files) > 1 else ''} {status.st_size} {status.st_mtime_ns}".encode())
            with path.open("rb") as file:
                for i in range(_NUM_SAMPLES):
                    file.seek(max(0, status.st_size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
