"""A GGUF file as a `Source`: Hugging Face's names, and rows of q and k in its order.

Files of architecture `llama` have the rotary pairs of a head side by side, those of Qwen have them half a head apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, GGUFError, UnsupportedModelError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.gguf_metadata import gguf_name, read_config
from nibble.engine.checkpoint.gguf_rows import read_rows, row_format
from nibble.engine.checkpoint.source import Floats, RowFormat, Rows, select_rows, tensor_shapes
from nibble.engine.checkpoint.tokenizer import read_tokenizer
from nibble.engine.model_config import ModelConfig

_PERMUTED_ARCHITECTURE = "llama"


class GGUFSource:
    """`Source` of one file."""

    def __init__(self, path: Path) -> None:
        """Raises SourceError, GGUFError, UnsupportedModelError."""
        self._file = GGUFFile(path)
        self.label = path.name
        self.config: ModelConfig = read_config(self._file)
        self._check_tensors()

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        order = self._row_order(name)
        values = self._file.dequantized(gguf_name(name), slice(None) if order is not None else rows)
        if not np.isfinite(values).all():
            raise ConversionError(f"{self.label}: tensor {gguf_name(name)} has numbers that are infinite or NaN")
        if order is None:
            return values
        return values[order][rows] if values.ndim > 1 else values[order]

    def format(self, name: str) -> RowFormat:
        return row_format(self._file, gguf_name(name))

    def rows(self, name: str) -> Rows:
        rows, order = read_rows(self._file, gguf_name(name)), self._row_order(name)
        return rows if order is None else select_rows(rows, order)

    def column_order(self, name: str) -> None:
        return None

    def stored_type(self, name: str) -> str:
        return self._file.tensor(gguf_name(name)).kind.name

    def stored_bytes(self, name: str) -> int:
        return self._file.tensor(gguf_name(name)).num_bytes

    def write_tokenizer(self, directory: Path) -> None:
        read_tokenizer(self._file).write(directory, self.config)

    def _row_order(self, name: str) -> npt.NDArray[np.intp] | None:
        """Which row of the file each row is; None: they are in order."""
        if self.config.architecture != _PERMUTED_ARCHITECTURE:
            return None
        if ".q_proj." in name:
            return rotate_half_rows(self.config.num_heads, self.config.head_dim)
        if ".k_proj." in name:
            return rotate_half_rows(self.config.num_kv_heads, self.config.head_dim)
        return None

    def _check_tensors(self) -> None:
        """Raise unless the file holds exactly the tensors of such a model, in the right shapes."""
        expected = {gguf_name(name): shape for name, shape in tensor_shapes(self.config).items()}
        if self.config.rope.frequency_divisors is not None and "rope_freqs.weight" in self._file.tensors:
            expected["rope_freqs.weight"] = (self.config.head_dim // 2,)
        for name, shape in expected.items():
            found = self._file.tensor(name).shape
            if found != shape:
                raise GGUFError(f"{self.label}: tensor {name} has shape {list(found)}, expected {list(shape)}")
        for name in self._file.tensors:
            if name not in expected:
                raise UnsupportedModelError(f"{self.label}: tensor {name} belongs to a feature that is not supported")


def rotate_half_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Which GGUF row each row of q or k comes from: GGUF has the D / 2 rotary pairs side by side (2i, 2i + 1), we have
    them half a head apart (i, i + D / 2)."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
