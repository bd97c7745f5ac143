"""What config.json alone says of a model whose weights are not there: enough for `convert.describe`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import UnsupportedModelError
from nibble.engine.checkpoint.hf_metadata import read_hf_config
from nibble.engine.checkpoint.packed_linears import Packing, row_format
from nibble.engine.checkpoint.quantization_config import read_quantization
from nibble.engine.checkpoint.source import RowFormat, tensor_shapes


class ConfiguredSource:
    """Which linears are quantised, and how, is taken from the configuration's word."""

    def __init__(self, directory: Path) -> None:
        """Raises SourceError, UnsupportedModelError."""
        self.label = directory.name
        self.config = read_hf_config(directory)
        self._quantization = read_quantization(directory)
        self._shapes = tensor_shapes(self.config)

    def format(self, name: str) -> RowFormat:
        packing = self._packing(name)
        if packing is None:
            return RowFormat("float16")
        form = row_format(packing, *self._shapes[name])
        if form is None:
            raise unsupported_groups(self.label, name, self._shapes[name], packing)
        return form

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        """Any but the usual one, the same for all that share their inputs, where there are orders."""
        packing = self._packing(name)
        if packing is None or not packing.is_reordered:
            return None
        return np.arange(self._shapes[name][1], dtype=np.int32)[::-1]

    def _packing(self, name: str) -> Packing | None:
        return None if self._quantization is None else self._quantization.stated(name.removesuffix(".weight"))


def unsupported_groups(label: str, name: str, shape: tuple[int, ...], packing: Packing) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{label}: tensor {name}: a linear of {shape[0]} x {shape[1]} in {packing.bits} bits with groups of "
        f"{packing.group_size} is not supported, only groups of a multiple of 32 that divide it"
    )
