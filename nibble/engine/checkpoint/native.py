"""The native checkpoint directory: packed weights in one safetensors file that is mapped, not read, at start.

A directory holds `model.safetensors` (tensors of `schema.py`, and in its metadata, under `nibble`, the JSON of
`schema.Description`), and beside it three files for gateways and for `transformers`: `config.json`, `tokenizer.json`
and `tokenizer_config.json`, which `tokenizer.py` and `hf_config.py` write. Nothing in it is executed or unpickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import NativeFormatError
from nibble.engine.checkpoint.safetensors_file import ALIGNMENT, SafetensorsFile, write_safetensors
from nibble.engine.checkpoint.schema import FORMAT_VERSION, Description, LinearFormat, TensorSpec, tensor_specs
from nibble.engine.model_config import ModelConfig
from nibble.kernels.interface import Float16Weight, Int4Weight, Int8Weight, Weight

WEIGHTS_FILE = "model.safetensors"
METADATA_KEY = "nibble"


class Checkpoint:
    """The tensors of one model, as read-only views of a memory map: pages are loaded when they are first touched."""

    def __init__(self, description: Description, file: SafetensorsFile) -> None:
        self.config: ModelConfig = description.config
        self.description = description
        self._file = file

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._file.specs)

    def has(self, name: str) -> bool:
        return name in self._file.specs

    def array(self, name: str) -> npt.NDArray[Any]:
        """One tensor of `schema.py`, not copied and not writable. Raises KeyError for a name that is not there."""
        return self._file.array(name)

    def linear(self, name: str) -> Weight:
        """The matrix of a linear, in whichever format the checkpoint holds it."""
        int4 = self.description.int4.get(name)
        if int4 is not None:
            return Int4Weight(self.array(name), int4.out_features, int4.in_features, int4.group_size)
        int8 = self.description.int8.get(name)
        if int8 is not None:
            return Int8Weight(self.array(f"{name}.values"), self.array(f"{name}.scales"), int8.group_size)
        return Float16Weight(self.array(name))


def load_checkpoint(directory: Path) -> Checkpoint:
    """Map a native checkpoint, having checked that every tensor is there, of the right dtype and shape, and aligned.

    Raises NativeFormatError or SafetensorsError. The weights themselves are not read.
    """
    path = directory / WEIGHTS_FILE
    file = SafetensorsFile(path)
    description = _checked_description(file, path)
    for name in description.ordered:  # kernels read where it says
        order = file.array(f"{name}.order")
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise NativeFormatError(f"{path}: tensor {name}.order is not an order of {len(order)} columns")
    for name in file.specs:
        if name.endswith(".kv_channels"):
            _check_channels(file.array(name), f"{path}: tensor {name}")
    return Checkpoint(description, file)


def read_description(directory: Path) -> Description:
    """As `load_checkpoint`, but reads the header alone."""
    path = directory / WEIGHTS_FILE
    return _checked_description(SafetensorsFile(path), path)


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    arrays: Iterable[tuple[str, npt.NDArray[Any]]],
    *,
    int4: Mapping[str, LinearFormat],
    int8: Mapping[str, LinearFormat],
    float16: Iterable[str] = (),
    ordered: Iterable[str] = (),
    has_kv_channels: bool = False,
) -> None:
    """Write `model.safetensors` into an existing directory. `arrays` yields each tensor once, in any order.

    Only one tensor need be in memory at a time. Raises NativeFormatError where config and formats do not fit each
    other, ConversionError where the disk does not hold the file.
    """
    description = Description(
        format_version=FORMAT_VERSION,
        config=config,
        int4=dict(int4),
        int8=dict(int8),
        float16=tuple(float16),
        ordered=tuple(ordered),
        has_kv_channels=has_kv_channels,
    )
    metadata = {"format": "nibble", METADATA_KEY: msgspec.json.encode(description).decode()}
    write_safetensors(directory / WEIGHTS_FILE, tensor_specs(description), metadata, arrays)


def _checked_description(file: SafetensorsFile, path: Path) -> Description:
    """Whose tensors are there, and no others."""
    description = _read_description(file, path)
    try:
        expected = tensor_specs(description)
    except NativeFormatError as error:
        raise NativeFormatError(f"{path}: {error}") from None
    for name, spec in expected.items():
        _check_tensor(file, name, spec, path)
    for name in file.specs:
        if name not in expected:
            raise NativeFormatError(f"{path}: tensor {name} is not part of this model")
    return description


def _read_description(file: SafetensorsFile, path: Path) -> Description:
    text = file.metadata.get(METADATA_KEY)
    if text is None:
        raise NativeFormatError(f"{path}: the metadata has no {METADATA_KEY!r} entry: not a native checkpoint")
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("format_version")
        if version != FORMAT_VERSION:
            raise NativeFormatError(
                f"{path}: native format version {version}, this release reads {FORMAT_VERSION}: convert the model again"
            )
        return msgspec.json.decode(text, type=Description)
    except (msgspec.DecodeError, RecursionError) as error:
        raise NativeFormatError(f"{path}: the metadata's {METADATA_KEY!r} entry: {error}") from None


def _check_channels(parameters: npt.NDArray[np.float32], name: str) -> None:
    """Kernels divide by the scales."""
    if not np.isfinite(parameters).all():
        raise NativeFormatError(f"{name} has numbers that are infinite or NaN")
    if not (parameters[:, :, 0] > 0).all():
        raise NativeFormatError(f"{name} has a scale of {parameters[:, :, 0].min()}, expected more than 0")


def _check_tensor(file: SafetensorsFile, name: str, expected: TensorSpec, path: Path) -> None:
    found = file.specs.get(name)
    wanted = f"expected {expected.dtype} {list(expected.shape)}"
    if found is None:
        raise NativeFormatError(f"{path}: tensor {name} is missing, {wanted}")
    if found != expected:
        raise NativeFormatError(f"{path}: tensor {name} is {found.dtype} {list(found.shape)}, {wanted}")
    if file.array(name).ctypes.data % ALIGNMENT:
        raise NativeFormatError(f"{path}: tensor {name} does not begin on a multiple of {ALIGNMENT} bytes")
