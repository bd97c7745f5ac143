"""The two native checkpoints that a ladder compares, made of one model: unquantised weights and 4-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.cache import exclusive, partial_directory, publish
from nibble.engine.checkpoint.convert import Progress, convert_checkpoint
from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.checkpoint.smooth_keys import SmoothKeySource
from nibble.engine.checkpoint.source import Float16Rows, Floats, RowFormat, Source, open_source


class Pair(NamedTuple):
    reference: Path
    quantized: Path


class FloatingSource:
    """A source whose stored integers are given as the numbers that they stand for."""

    def __init__(self, stored: Source) -> None:
        self._stored = stored
        self.label = stored.label
        self.config = stored.config

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        return self._stored.floats(name, rows)

    def format(self, name: str) -> RowFormat:
        return RowFormat("float16")

    def rows(self, name: str) -> Float16Rows:
        return Float16Rows(self._stored.floats(name).astype(np.float16))

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        return None

    def stored_type(self, name: str) -> str:
        return self._stored.stored_type(name)

    def stored_bytes(self, name: str) -> int:
        return self._stored.stored_bytes(name)

    def write_tokenizer(self, directory: Path) -> None:
        self._stored.write_tokenizer(directory)


def make_pair(
    model: Path, quantized: Path | None, cache_dir: Path, quantize: Callable[[Path], None], progress: Progress
) -> Pair:
    """Both, from the cache where they are there. quantized: the 4-bit one, where it is not to be the model's own.

    A model that is stored in 4 bits is compared with the weights that its numbers stand for. One in floating point is
    quantised by `quantize`, which writes the directory that it is given. Raises CheckpointError.
    """
    source = SmoothKeySource(open_source(model))
    if quantized is not None and quantized.exists():
        _check_same_model(source, quantized)
    as_stored = resolve_checkpoint(model, cache_dir, progress)
    if source.format("model.layers.0.mlp.down_proj.weight").kind == "float16":
        target = quantized or as_stored.with_name(as_stored.name + "-w4")
        if not target.exists():
            quantize(target)
        return Pair(as_stored, target)
    reference = as_stored.with_name(as_stored.name + "-fp16")
    with exclusive(reference):
        if not reference.exists():
            with partial_directory(reference) as directory:
                convert_checkpoint(FloatingSource(source), directory, progress)
                publish(directory, reference)
    return Pair(reference, quantized or as_stored)


def _check_same_model(source: Source, quantized: Path) -> None:
    """As far as shapes tell. Raises CheckpointError."""
    config = load_checkpoint(quantized).config
    for name in ("architecture", "vocab_size", "hidden_size", "num_layers", "max_context_tokens"):
        own, other = getattr(source.config, name), getattr(config, name)
        if own != other:
            raise SourceError(f"{quantized}: is not of the model {source.label}: {name} is {other}, not {own}")
