"""A foreign checkpoint to a native one: once per model, without torch, one tensor in memory at a time.

What changes: q, k, v become one matrix, gate and up another with interleaved rows, and 4-bit weights are re-ordered
into tiles. What does not: the weights, wherever `row_formats.py` can keep them. The head, which every step reads,
becomes INT8 where the model is quantised. What became of which types is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError, UnsupportedModelError
from nibble.engine.checkpoint.hf_config import write_hf_config
from nibble.engine.checkpoint.native import write_checkpoint
from nibble.engine.checkpoint.row_formats import GROUP_SIZE, common_format, round_to_int8, to_format
from nibble.engine.checkpoint.schema import FORMAT_VERSION, Description, LinearFormat, linear_sizes
from nibble.engine.checkpoint.source import Float16Rows, Floats, Int4Rows, RowFormat, Rows, Source, SourceFormats
from nibble.engine.model_config import ModelConfig
from nibble.kernels.pack import interleave_gate_up, pack_int4

Progress = Callable[[str, float], None]  # what is being done, and how much of it is: 0 to 1

_PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

_INT8 = RowFormat("int8", GROUP_SIZE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Linear:
    """A native linear and the tensors of the source whose rows it is made of.

    order: as `Source.column_order`, the same for all parts. is_reread: made of `Source.floats`, because parts have
    orders of their own, or the linear must have none.
    """

    name: str
    parts: tuple[str, ...]
    size: tuple[int, int]
    format: RowFormat
    order: npt.NDArray[np.int32] | None = None
    is_reread: bool = False


def convert_checkpoint(
    source: Source, out_dir: Path, progress: Progress, kv_channels: Sequence[Floats] | None = None
) -> None:
    """Write a native checkpoint into the existing directory `out_dir`. kv_channels: those of `schema.py`, by layer.

    Raises CheckpointError, before anything is written where the model is not one that Nibble runs.
    """
    config = source.config
    linears = _plan(source)
    progress("building the tokenizer", 0.0)
    source.write_tokenizer(out_dir)
    progress("building the tokenizer", 1.0)
    write_hf_config(out_dir, config)
    description = _description(config, linears)
    write_checkpoint(
        out_dir,
        config,
        chain(_arrays(source, linears, progress), _kv_channel_arrays(kv_channels or ())),
        int4=description.int4,
        int8=description.int8,
        float16=description.float16,
        ordered=description.ordered,
        has_kv_channels=kv_channels is not None,
    )
    _log_summary(source, linears)


def describe(source: SourceFormats) -> Description:
    """What `convert_checkpoint` would write. Reads no weights. Raises CheckpointError."""
    return _description(source.config, _plan(source))


def _description(config: ModelConfig, linears: list[_Linear]) -> Description:
    formats = {linear.name: LinearFormat(*linear.size, linear.format.group_size) for linear in linears}
    return Description(
        format_version=FORMAT_VERSION,
        config=config,
        int4={linear.name: formats[linear.name] for linear in linears if linear.format.kind == "int4"},
        int8={linear.name: formats[linear.name] for linear in linears if linear.format.kind == "int8"},
        float16=tuple(linear.name for linear in linears if linear.format.kind == "float16"),
        ordered=tuple(linear.name for linear in linears if linear.order is not None),
    )


def _plan(source: SourceFormats) -> list[_Linear]:
    linears = [_plan_linear(source, name, size) for name, size in linear_sizes(source.config).items()]
    if all(linear.format.kind == "float16" for linear in linears):
        return linears
    head = "embedding" if source.config.tie_word_embeddings else "lm_head"
    return [replace(linear, format=_INT8) if linear.name == head else linear for linear in linears]


def _plan_linear(source: SourceFormats, name: str, size: tuple[int, int]) -> _Linear:
    parts = _parts_of(name)
    for part in parts:
        if size[1] % GROUP_SIZE:
            raise UnsupportedModelError(
                f"{source.label}: tensor {part} has rows of {size[1]}, not a multiple of {GROUP_SIZE}"
            )
    form = common_format([source.format(part) for part in parts])
    is_table = name in ("embedding", "lm_head")
    if is_table and form.kind == "int4":
        form = _INT8
    order, *others = (source.column_order(part) for part in parts)
    if not all(_is_same(order, other) for other in others) or (is_table and order is not None):
        return _Linear(name, parts, size, _INT8, is_reread=True)
    return _Linear(name, parts, size, form, order)


def _is_same(order: npt.NDArray[np.int32] | None, other: npt.NDArray[np.int32] | None) -> bool:
    return order is other is None or (order is not None and other is not None and np.array_equal(order, other))


def _parts_of(name: str) -> tuple[str, ...]:
    if name == "embedding":
        return ("model.embed_tokens.weight",)
    if name == "lm_head":
        return ("lm_head.weight",)
    prefix, _, stem = name.rpartition(".")
    return tuple(f"model.{prefix}.{part}.weight" for part in _PARTS[stem])


def _arrays(source: Source, linears: list[_Linear], progress: Progress) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every tensor of the native checkpoint, in the order of the file."""
    config = source.config
    sizes = [sum(source.stored_bytes(part) for part in linear.parts) for linear in linears]
    done = 0
    for linear, num_bytes in zip(linears, sizes, strict=True):
        progress("converting the weights", done / sum(sizes))
        done += num_bytes
        prefix, _, stem = linear.name.rpartition(".")
        if stem == "qkv":
            yield f"{prefix}.attention_norm", source.floats(f"model.{prefix}.input_layernorm.weight")
        if stem == "gate_up":
            yield f"{prefix}.mlp_norm", source.floats(f"model.{prefix}.post_attention_layernorm.weight")
        yield from _linear_arrays(source, linear)
        if stem == "qkv" and config.attention_bias:
            biases = [source.floats(f"{part.removesuffix('weight')}bias") for part in linear.parts]
            yield f"{linear.name}.bias", np.concatenate(biases)
        if stem == "qkv" and config.qk_norm:
            for which in "qk":
                yield f"{prefix}.{which}_norm", source.floats(f"model.{prefix}.self_attn.{which}_norm.weight")
    yield "final_norm", source.floats("model.norm.weight")
    progress("converting the weights", 1.0)


def _kv_channel_arrays(kv_channels: Sequence[Floats]) -> Iterator[tuple[str, Floats]]:
    for index, parameters in enumerate(kv_channels):
        yield f"layers.{index}.kv_channels", parameters


def _linear_arrays(source: Source, linear: _Linear) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    read = _reread if linear.is_reread else _read
    rows = _joined([read(source, part, linear.format) for part in linear.parts], linear.name.endswith("gate_up"))
    if isinstance(rows, Int4Rows):
        yield linear.name, pack_int4(*rows)
    elif isinstance(rows, Float16Rows):
        yield linear.name, rows.values
    else:
        yield f"{linear.name}.values", rows.values
        yield f"{linear.name}.scales", rows.scales
    if linear.order is not None:
        yield f"{linear.name}.order", linear.order


def _read(source: Source, part: str, target: RowFormat) -> Rows:
    rows = to_format(source.rows(part), target)
    if not all(np.isfinite(array).all() for array in rows[1:]):
        raise ConversionError(f"{source.label}: tensor {part} has weights that are infinite, NaN or beyond fp16")
    return rows


def _reread(source: Source, part: str, target: RowFormat) -> Rows:
    assert target == _INT8, "what is read as floats becomes INT8"
    return round_to_int8(source.floats(part))


def _joined(parts: list[Rows], interleaved: bool) -> Rows:
    """One matrix of parts that have one format."""
    if len(parts) == 1:
        return parts[0]
    join: Callable[..., Any] = interleave_gate_up if interleaved else lambda *arrays: np.concatenate(arrays)
    return type(parts[0])(*(join(*same) for same in zip(*parts, strict=True)))


def _log_summary(source: Source, linears: list[_Linear]) -> None:
    """One line: how many linears there are of each format, and which types of the source they came from."""
    counts = {kind: sum(linear.format.kind == kind for linear in linears) for kind in ("int4", "int8", "float16")}
    types: dict[str, int] = {}
    for linear in linears:
        key = "+".join(dict.fromkeys(source.stored_type(part) for part in linear.parts)) + f">{linear.format.kind}"
        types[key] = types.get(key, 0) + 1
    logger.info(
        "converted source=%s int4_linears=%d int8_linears=%d float16_linears=%d %s",
        source.label,
        *counts.values(),
        ",".join(f"{key}:{count}" for key, count in types.items()),
    )
