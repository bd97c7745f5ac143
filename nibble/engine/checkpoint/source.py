"""A checkpoint in somebody else's format, seen one way: Hugging Face's tensor names, shapes and order of rows.

`open_source` finds out what a path is. Whoever wants numbers (a quantiser, a comparison) takes `floats`, whatever they
are stored as; `convert.py` takes `rows`, which keeps stored integers as they are. Readers are `hf_source.py` and
`gguf_source.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import SourceError
from nibble.engine.model_config import ModelConfig

Floats: TypeAlias = npt.NDArray[np.float32]


class Float16Rows(NamedTuple):
    values: npt.NDArray[np.float16]  # (N, K)


class Int8Rows(NamedTuple):
    """w[n, k] = scales[n, k // group_size] * values[n, k]"""

    values: npt.NDArray[np.int8]  # (N, K)
    scales: npt.NDArray[np.float16]  # (N, K / group_size)


class Int4Rows(NamedTuple):
    """w[n, k] = scale[n, k // group_size] * q[n, k] + minimum[n, k // group_size]"""

    q: npt.NDArray[np.uint8]  # (N, K), 0..15
    scale: npt.NDArray[np.float16]  # (N, K / group_size)
    minimum: npt.NDArray[np.float16]


# Arrays with one leading axis of rows: to reorder, join or interleave rows is the same for all of them.
Rows: TypeAlias = Float16Rows | Int8Rows | Int4Rows


@dataclass(frozen=True)
class RowFormat:
    """What `Source.rows` gives for a matrix. group_size: columns with one scale; 0 for float16."""

    kind: Literal["float16", "int8", "int4"]
    group_size: int = 0


class SourceFormats(Protocol):
    """What can be known of a checkpoint without its weights. Methods raise CheckpointError, naming the tensor."""

    @property
    def label(self) -> str:
        """What messages call it: the file's or directory's name."""

    @property
    def config(self) -> ModelConfig: ...

    def format(self, name: str) -> RowFormat:
        """What `Source.rows` will give for a matrix."""

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        """Column j of `Source.rows` is column order[j] of the matrix; None: they are in order."""


class Source(SourceFormats, Protocol):
    """One checkpoint, checked when it is opened: exactly the tensors of its config are there, in the right shapes.

    All methods raise CheckpointError, naming the tensor, for what is damaged or cannot be read.
    """

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        """The tensor of this name in `tensor_shapes`, or some rows of a matrix, as new finite float32."""

    def rows(self, name: str) -> Rows:
        """The matrix of this name in the form that loses nothing, or as little as there is, its columns in
        `column_order` (those of `floats` are always in order)."""

    def stored_type(self, name: str) -> str:
        """What the format calls the type of a tensor, for people."""

    def stored_bytes(self, name: str) -> int: ...

    def write_tokenizer(self, directory: Path) -> None:
        """tokenizer.json and tokenizer_config.json, chat template included."""


def open_source(path: Path) -> Source:
    """The checkpoint at `path`: a GGUF file or a Hugging Face directory.

    Raises SourceError where it is neither, other CheckpointErrors where it is damaged or of an unsupported model.
    """
    from nibble.engine.checkpoint.kind import Kind, kind_of

    kind = kind_of(path)
    if kind is Kind.NATIVE:
        raise SourceError(f"{path}: is a native checkpoint; name the model that it was made of")
    if kind is Kind.HUGGING_FACE:
        from nibble.engine.checkpoint.hf_source import HuggingFaceSource

        return HuggingFaceSource(path)
    from nibble.engine.checkpoint.gguf_source import GGUFSource

    return GGUFSource(path)


def floating_tensors(source: Source) -> Iterator[tuple[str, Floats]]:
    """Every tensor of the model, one in memory at a time, layer by layer."""
    for name in tensor_shapes(source.config):
        yield name, source.floats(name)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name and shape of every tensor of such a model; one of two tied matrices is left out."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(config).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Those of one layer, without `model.layers.{i}.`."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, size in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"self_attn.{name}_proj.weight"] = (size, hidden)
        if config.attention_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (size,)
        if config.qk_norm and name != "v":
            shapes[f"self_attn.{name}_norm.weight"] = (config.head_dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (intermediate, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, intermediate)
    return shapes


def select_rows(rows: Rows, index: Any) -> Rows:
    """Some rows, or all in another order."""
    return type(rows)(*(array[index] for array in rows))
