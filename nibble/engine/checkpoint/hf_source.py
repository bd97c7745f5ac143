"""A Hugging Face directory: config.json, safetensors (one file or shards), tokenizer.json and its companions.

Weights in floating point; how quantised ones are packed is `hf_quantized.py`'s. Pickled weights (pytorch_model.bin) are
never opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.hf_config import write_file, write_json
from nibble.engine.checkpoint.hf_metadata import read_hf_config, read_json
from nibble.engine.checkpoint.safetensors_file import SafetensorsFile
from nibble.engine.checkpoint.schema import TensorSpec
from nibble.engine.checkpoint.source import Float16Rows, Floats, RowFormat, Rows, layer_shapes, tensor_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = ("F32", "F16", "BF16")
_IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".masked_bias")  # buffers that old versions of transformers saved


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


class HuggingFaceSource:
    """`Source` of a directory with weights in floating point."""

    def __init__(self, directory: Path) -> None:
        """Raises SourceError for what is missing or contradictory, UnsupportedModelError, SafetensorsError."""
        self._directory = directory
        self.label = directory.name
        self.config = read_hf_config(directory)
        if not (directory / "tokenizer.json").is_file():
            raise SourceError(f"{directory}: tokenizer.json is missing (tokenizer.model alone is not supported)")
        self._shards = Shards(directory)
        self._check_tensors()

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        return self._shards.floats(name, rows)

    def format(self, name: str) -> RowFormat:
        return RowFormat("float16")

    def rows(self, name: str) -> Rows:
        return Float16Rows(self._float16(name))

    def stored_type(self, name: str) -> str:
        return self._shards.spec(name).dtype

    def stored_bytes(self, name: str) -> int:
        return int(self._shards.array(name).nbytes)

    def write_tokenizer(self, directory: Path) -> None:
        write_hf_tokenizer(self._directory, directory)

    def _float16(self, name: str) -> npt.NDArray[np.float16]:
        """Chunk by chunk: the embedding of a small model is most of it."""
        num_rows, num_columns = self._shards.spec(name).shape
        values = np.empty((num_rows, num_columns), np.float16)
        step = max(1, (1 << 24) // num_columns)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            with np.errstate(over="ignore"):
                values[rows] = self._shards.floats(name, rows)
            if not np.isfinite(values[rows]).all():
                raise ConversionError(f"{self.label}: tensor {name} has weights beyond fp16's 65504")
        return values

    def _check_tensors(self) -> None:
        for name in layer_shapes(self.config):  # before a hostile number of layers is unrolled
            self._shards.spec(f"model.layers.{self.config.num_layers - 1}.{name}")
        expected = tensor_shapes(self.config)
        for name, shape in expected.items():
            spec = self._shards.spec(name)
            if spec.shape != shape:
                raise SourceError(f"{self.label}: tensor {name} has shape {list(spec.shape)}, expected {list(shape)}")
            if spec.dtype not in FLOAT_DTYPES:
                raise UnsupportedModelError(
                    f"{self.label}: tensor {name} is {spec.dtype}; supported are {', '.join(FLOAT_DTYPES)}"
                )
        for name in self._shards.names:
            is_tied_head = name == "lm_head.weight"  # saved though it is the embedding
            if name not in expected and not is_tied_head and not name.endswith(_IGNORED_ENDINGS):
                raise UnsupportedModelError(f"{self.label}: tensor {name} belongs to a feature that is not supported")


def is_hf_directory(directory: Path) -> bool:
    """Whether it looks like a Hugging Face model, weights or not."""
    return (directory / "config.json").is_file()


def _weight_files(directory: Path) -> list[Path]:
    """Those that the index names, or the only one."""
    index = directory / INDEX_FILE
    if not index.is_file():
        if (directory / SINGLE_FILE).is_file():
            return [directory / SINGLE_FILE]
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


def write_hf_tokenizer(source: Path, target: Path) -> None:
    """tokenizer.json as it is; the chat template, wherever it is kept, goes into tokenizer_config.json."""
    config = source / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    template = source / "chat_template.jinja"
    if template.is_file():
        values["chat_template"] = template.read_text(encoding="utf-8")
    elif (source / "chat_template.json").is_file():
        values["chat_template"] = read_json(source / "chat_template.json").get("chat_template")
    read_json(source / "tokenizer.json")  # damaged ones are refused here, not by every gateway
    write_file(target / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    write_json(target / "tokenizer_config.json", values)
