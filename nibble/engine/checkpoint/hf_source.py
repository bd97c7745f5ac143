"""A Hugging Face directory: config.json, safetensors (one file or shards), tokenizer.json and its companions.

How quantised linears are packed is `packed_linears.py`'s. Pickled weights (pytorch_model.bin) are never opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.configured_source import unsupported_groups
from nibble.engine.checkpoint.errors import ConversionError, SourceError, UnsupportedModelError
from nibble.engine.checkpoint.hf_metadata import read_hf_config
from nibble.engine.checkpoint.hf_tokenizer import write_hf_tokenizer
from nibble.engine.checkpoint.packed_linears import Packing, Tensor, column_order, num_groups, row_format, to_rows
from nibble.engine.checkpoint.quantization_config import read_quantization
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
        self._quantization = read_quantization(directory)
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
        form = row_format(packing, *self._shapes[name])
        assert form is not None, f"{name} was checked to have groups"
        return form

    def rows(self, name: str) -> Rows:
        packing = self._packing_of(name)
        if packing is None:
            return Float16Rows(self._float16(name))
        packed, order = packing.unpack(self._reader(name)), self.column_order(name)
        try:
            return to_rows(packed, order, self.format(name))
        except ValueError as error:
            raise UnsupportedModelError(f"{self.label}: tensor {_sibling(name, packing.marker)} {error}") from None

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
        return self._shards.spec(name).dtype if packing is None else f"{type(packing).__name__}-{packing.bits}"

    def stored_bytes(self, name: str) -> int:
        packing = self._packing_of(name)
        return int(self._shards.array(name if packing is None else _sibling(name, packing.marker)).nbytes)

    def write_tokenizer(self, directory: Path) -> None:
        write_hf_tokenizer(self._directory, directory)

    def _packing_of(self, name: str) -> Packing | None:
        if self._quantization is None or not self._shards.has(_sibling(name, self._quantization.packing.marker)):
            return None
        return self._quantization.of_packed(name.removesuffix(".weight"))

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
        if row_format(packing, *shape) is None:
            raise unsupported_groups(self.label, _sibling(name, packing.marker), shape, packing)
        parts = {_sibling(name, suffix): tensor for suffix, tensor in packing.tensors(*shape).items()}
        groups = _sibling(name, packing.groups)
        if self._shards.has(groups):
            parts[groups] = Tensor(("I32",), shape[1:])
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
        return self._quantization is not None and name.endswith(".bias") and not self._shards.array(name).any()


def _sibling(name: str, suffix: str) -> str:
    return name.removesuffix("weight") + suffix
