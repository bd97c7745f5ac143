"""A Hugging Face directory: config.json, safetensors (one file or shards), tokenizer.json and its companions.

How quantised linears are packed is `packed_int4.py`'s. Pickled weights (pytorch_model.bin) are never opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.hf_metadata import read_hf_config
from nibble.engine.checkpoint.hf_tokenizer import write_hf_tokenizer
from nibble.engine.checkpoint.packed_int4 import (
    PER_WORD,
    Packing,
    Tensor,
    column_order,
    native_group_size,
    num_groups,
    to_int4,
)
from nibble.engine.checkpoint.quantization_config import read_packing
from nibble.engine.checkpoint.row_formats import chunks_of, dequantize_rows
from nibble.engine.checkpoint.shards import Shards
from nibble.engine.checkpoint.source import (
    Float16Rows,
    Floats,
    RowFormat,
    Rows,
    select_rows,
    tensor_shapes,
)

FLOAT_DTYPES = ("F32", "F16", "BF16")
_IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".masked_bias")  # buffers that old versions of transformers saved


class HuggingFaceSource:
    """`Source` of a directory."""

    def __init__(self, directory: Path) -> None:
        """Raises SourceError for what is missing or contradictory, UnsupportedModelError, SafetensorsError."""
        self._directory = directory
        self.label = directory.name
        self.config = read_hf_config(directory)
        self._packing = read_packing(directory)
        if not (directory / "tokenizer.json").is_file():
            raise SourceError(f"{directory}: tokenizer.json is missing (tokenizer.model alone is not supported)")
        self._shards = Shards(directory)
        self._shapes = self._checked_shapes()

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        packing = self._packing_of(name)
        if packing is None:
            return self._shards.floats(name, rows)
        with np.errstate(invalid="ignore"):
            values = dequantize_rows(select_rows(self.rows(name), rows))
        if not np.isfinite(values).all():
            raise ConversionError(f"{self.label}: tensor {name} has weights that are infinite, NaN or beyond fp16")
        order = self.column_order(name)
        return values if order is None else values[:, np.argsort(order)]

    def format(self, name: str) -> RowFormat:
        packing = self._packing_of(name)
        if packing is None:
            return RowFormat("float16")
        group_size = native_group_size(self._shapes[name][1], packing.group_size)
        assert group_size is not None, f"{name} was checked to have groups"
        return RowFormat("int4", group_size)

    def rows(self, name: str) -> Rows:
        packing = self._packing_of(name)
        if packing is None:
            return Float16Rows(self._float16(name))
        return to_int4(packing.unpack(self._reader(name)), self.column_order(name), self.format(name).group_size)

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        packing = self._packing_of(name)
        if packing is None or not self._shards.has(_sibling(name, packing.groups)):
            return None
        groups = _sibling(name, packing.groups)
        try:
            return column_order(self._shards.array(groups), num_groups(self._shapes[name][1], packing.group_size))
        except ValueError as error:
            raise SourceError(f"{self.label}: tensor {groups} {error}") from None

    def stored_type(self, name: str) -> str:
        packing = self._packing_of(name)
        return self._shards.spec(name).dtype if packing is None else type(packing).__name__

    def stored_bytes(self, name: str) -> int:
        packing = self._packing_of(name)
        return int(self._shards.array(name if packing is None else _sibling(name, packing.marker)).nbytes)

    def write_tokenizer(self, directory: Path) -> None:
        write_hf_tokenizer(self._directory, directory)

    def _packing_of(self, name: str) -> Packing | None:
        if self._packing is not None and self._shards.has(_sibling(name, self._packing.marker)):
            return self._packing
        return None

    def _reader(self, name: str) -> Callable[[str], npt.NDArray[Any]]:
        def get(suffix: str) -> npt.NDArray[Any]:
            sibling = _sibling(name, suffix)
            is_float = self._shards.spec(sibling).dtype in FLOAT_DTYPES
            return self._shards.floats(sibling) if is_float else self._shards.array(sibling)

        return get

    def _float16(self, name: str) -> npt.NDArray[np.float16]:
        """Chunk by chunk: the embedding of a small model is most of it."""
        values = np.empty(self._shards.spec(name).shape, np.float16)
        for chunk in chunks_of(*values.shape):
            with np.errstate(over="ignore"):
                values[chunk] = self._shards.floats(name, chunk)
            if not np.isfinite(values[chunk]).all():
                raise ConversionError(f"{self.label}: tensor {name} has weights beyond fp16's 65504")
        return values

    def _checked_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the model's tensors are, all of which and no others are there."""
        shapes, expected = tensor_shapes(self.config), set()
        for name, shape in shapes.items():
            expected |= self._check_packed(name, shape) if self._packing_of(name) else self._check_float(name, shape)
        for name in self._shards.names:
            if name not in expected and not self._is_void(name):
                raise UnsupportedModelError(f"{self.label}: tensor {name} belongs to a feature that is not supported")
        self._check_tied_head()
        return shapes

    def _check_tied_head(self) -> None:
        """A head that is stored although it is said to be the embedding has to be that: which one is meant is not
        known, and `transformers` has changed its mind about it."""
        embedding, head = "model.embed_tokens.weight", "lm_head.weight"
        if not self.config.tie_word_embeddings or not self._shards.has(head):
            return
        if not self._shards.is_same(embedding, head):
            raise SourceError(
                f"{self.label}: tensor {head} is not {embedding}, though config.json says that they are one: "
                "tie_word_embeddings has to be false, or the head has to go"
            )

    def _check_float(self, name: str, shape: tuple[int, ...]) -> set[str]:
        self._check_spec(name, Tensor(FLOAT_DTYPES, shape))
        return {name}

    def _check_packed(self, name: str, shape: tuple[int, ...]) -> set[str]:
        """-> the names of what it is made of."""
        packing = self._packing_of(name)
        assert packing is not None, f"{name} is packed"
        num_rows, num_columns = shape
        if num_rows % PER_WORD or native_group_size(num_columns, packing.group_size) is None:
            raise UnsupportedModelError(
                f"{self.label}: tensor {_sibling(name, packing.marker)}: a linear of {num_rows} x {num_columns} with "
                f"groups of {packing.group_size} is not supported, only groups of a multiple of 32 that divide it"
            )
        parts = {_sibling(name, suffix): tensor for suffix, tensor in packing.tensors(*shape).items()}
        groups = _sibling(name, packing.groups)
        if self._shards.has(groups):
            parts[groups] = Tensor(("I32",), (num_columns,))
        for part, tensor in parts.items():
            self._check_spec(part, tensor)
        return set(parts)

    def _check_spec(self, name: str, expected: Tensor) -> None:
        spec = self._shards.spec(name)
        if spec.shape != expected.shape:
            raise SourceError(
                f"{self.label}: tensor {name} has shape {list(spec.shape)}, expected {list(expected.shape)}"
            )
        if spec.dtype not in expected.dtypes:
            raise UnsupportedModelError(
                f"{self.label}: tensor {name} is {spec.dtype}; supported are {', '.join(expected.dtypes)}"
            )

    def _is_void(self, name: str) -> bool:
        """Whether a tensor that the model has no use for changes nothing."""
        if name == "lm_head.weight" or name.endswith(_IGNORED_ENDINGS):  # of a tied model, the embedding once more
            return True
        # Quantisers write biases where the model has none.
        return self._packing is not None and name.endswith(".bias") and not self._shards.array(name).any()


def _sibling(name: str, suffix: str) -> str:
    return name.removesuffix("weight") + suffix
