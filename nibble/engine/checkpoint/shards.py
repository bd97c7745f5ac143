"""The tensors of a Hugging Face directory by name, whether in one safetensors file or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, SourceError
from nibble.engine.checkpoint.hf_metadata import read_json
from nibble.engine.checkpoint.row_formats import chunks_of
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.engine.checkpoint.schema import TensorSpec
from nibble.engine.checkpoint.source import Floats

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Shards:
    """The tensors of one or several safetensors files by name."""

    def __init__(self, directory: Path) -> None:
        """Raises SourceError, or SafetensorsError for a malformed file."""
        self.label = directory.name
        self._files: dict[str, SafetensorsFile] = {}
        for path in _weight_files(directory):
            file = SafetensorsFile(path)
            for name in file.specs:
                if name in self._files:
                    raise SourceError(f"{path}: tensor {name[:100]} is in another file too")
                self._files[name] = file

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def has(self, name: str) -> bool:
        return name in self._files

    def spec(self, name: str) -> TensorSpec:
        """Raises SourceError where there is no such tensor."""
        try:
            return self._files[name].specs[name]
        except KeyError:
            raise SourceError(f"{self.label}: tensor {name} is missing") from None

    def array(self, name: str) -> npt.NDArray[Any]:
        """A read-only view, of BF16 the bits."""
        self.spec(name)
        return self._files[name].array(name)

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        """As new float32. Raises ConversionError for numbers that are not finite."""
        stored = self.array(name)[rows if len(self.spec(name).shape) > 1 else ...]
        if self.spec(name).dtype == "BF16":
            values = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise ConversionError(f"{self.label}: tensor {name} has numbers that are infinite or NaN")
        return values

    def is_same(self, name: str, other: str) -> bool:
        """Whether two matrices have the same finite numbers, whatever their types are."""
        shape = self.spec(name).shape
        if self.spec(other).shape != shape:
            return False
        return all(np.array_equal(self.floats(name, rows), self.floats(other, rows)) for rows in chunks_of(*shape))


def _weight_files(directory: Path) -> list[Path]:
    """Those that the index names, or the only one."""
    index = directory / INDEX_FILE
    if not index.is_file():
        found = sorted(directory.glob("*.safetensors"))
        if (directory / SINGLE_FILE).is_file() or len(found) == 1:  # quantisers name theirs otherwise
            return [directory / SINGLE_FILE] if len(found) != 1 else found
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)]
        reason = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        raise SourceError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{reason}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SourceError(f"{index}: weight_map is not an object of file names")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise SourceError(f"{index}: names {name[:100]!r}, which is not a file beside it")
    return [directory / name for name in files]
