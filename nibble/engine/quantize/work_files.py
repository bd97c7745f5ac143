"""Finished layers on disk while a model is quantised: one safetensors file each, so that an interrupted run goes on.

Tensors: `{linear}.q` uint8 (N, K), `{linear}.scale` and `{linear}.minimum` float16 (N, K / group_size); as float32 the
layer's vectors, `scales.{input}` and `statistics.{name}`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nibble.engine.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from nibble.engine.checkpoint.schema import TensorSpec
from nibble.engine.checkpoint.source import Floats, Int4Rows
from nibble.engine.quantize.decoder import LINEARS
from nibble.engine.quantize.grid import Grid, QuantizedMatrix
from nibble.engine.quantize.layer import QuantizedLayer

_DTYPES = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
_SCALES, _STATISTICS = "scales.", "statistics."


class WorkFiles:
    """The layers in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[int, SafetensorsFile] = {}

    def has(self, index: int) -> bool:
        return self._path(index).exists()

    def write(self, index: int, layer: QuantizedLayer) -> None:
        """Whole or not at all. Raises ConversionError where the disk does not hold it."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, matrix in layer.matrices.items():
            arrays[f"{name}.q"] = matrix.q.cpu().numpy()
            arrays[f"{name}.scale"] = matrix.grid.scale.half().cpu().numpy()
            arrays[f"{name}.minimum"] = matrix.grid.minimum.half().cpu().numpy()
        vectors = layer.rest | {_SCALES + key: values for key, values in layer.scales.items()}
        vectors |= {_STATISTICS + name: values for name, values in layer.statistics.items()}
        arrays |= {name: values.float().cpu().numpy() for name, values in vectors.items()}
        specs = {name: TensorSpec(_DTYPES[array.dtype], array.shape) for name, array in arrays.items()}
        partial = self._path(index).with_suffix(".partial")
        write_safetensors(partial, specs, {}, arrays.items())
        os.replace(partial, self._path(index))

    def read(self, index: int, device: torch.device) -> QuantizedLayer:
        """Without its statistics."""
        matrices = {}
        for name in LINEARS:
            q, scale, minimum = (torch.from_numpy(array.copy()).to(device) for array in self.rows(index, name))
            matrices[name] = QuantizedMatrix(q, Grid(scale.float(), minimum.float()))
        vectors = {name: torch.from_numpy(self.vector(index, name)).to(device) for name in self._vectors(index)}
        scales = {name.removeprefix(_SCALES): vectors.pop(name) for name in list(vectors) if name.startswith(_SCALES)}
        return QuantizedLayer(matrices, vectors, scales)

    def rows(self, index: int, name: str) -> Int4Rows:
        """One linear, as views of the file."""
        file = self._file(index)
        return Int4Rows(file.array(f"{name}.q"), file.array(f"{name}.scale"), file.array(f"{name}.minimum"))

    def vector(self, index: int, name: str) -> Floats:
        """A new array."""
        return self._file(index).array(name).copy()

    def statistics(self, index: int) -> dict[str, Floats]:
        names = [name for name in self._file(index).specs if name.startswith(_STATISTICS)]
        return {name.removeprefix(_STATISTICS): self.vector(index, name) for name in names}

    def _vectors(self, index: int) -> list[str]:
        matrices = {f"{name}.{part}" for name in LINEARS for part in Int4Rows._fields}
        return [n for n in self._file(index).specs if n not in matrices and not n.startswith(_STATISTICS)]

    def _file(self, index: int) -> SafetensorsFile:
        if index not in self._open:
            self._open[index] = SafetensorsFile(self._path(index))
        return self._open[index]

    def _path(self, index: int) -> Path:
        return self._directory / f"layer-{index}.safetensors"
