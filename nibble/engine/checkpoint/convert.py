"""GGUF to native: once per model, without torch, one tensor in memory at a time.

What changes: q and k rows go from GGUF's order (for rotary pairs side by side) to rotate-half order, q, k, v become one
matrix, gate and up another with interleaved rows, and 4-bit blocks are re-ordered into tiles. What does not: the
weights, wherever `requantize.py` can keep them; how many had to be rounded is logged. A matrix whose parts are all Q4_0
or Q4_1 becomes INT4, any other INT8.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.errors import ConversionError
from nibble.engine.checkpoint.gguf import GGUFFile
from nibble.engine.checkpoint.hf_config import write_hf_config
from nibble.engine.checkpoint.llama_metadata import read_config
from nibble.engine.checkpoint.native import write_checkpoint
from nibble.engine.checkpoint.requantize import (
    GROUP_SIZE,
    INT4_TYPES,
    LOSSLESS_INT8_TYPES,
    RowArrays,
    int4_rows,
    int8_rows,
    require_readable,
)
from nibble.engine.checkpoint.schema import LinearFormat, linear_sizes
from nibble.engine.checkpoint.tokenizer import read_tokenizer
from nibble.engine.model_config import ModelConfig
from nibble.kernels.pack import interleave_gate_up, pack_int4

Progress = Callable[[str, float], None]  # what is being done, and how much of it is: 0 to 1

_PARTS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "o": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Linear:
    """A native linear and the GGUF tensors whose rows it is made of."""

    name: str
    parts: tuple[str, ...]
    is_int4: bool
    format: LinearFormat


def convert_gguf(path: Path, out_dir: Path, progress: Progress) -> None:
    """Write a native checkpoint into the existing directory `out_dir`.

    Raises CheckpointError, before anything is written where the model is not one that Nibble runs.
    """
    file = GGUFFile(path)
    config = read_config(file)
    linears = [_plan_linear(file, name, size) for name, size in linear_sizes(config).items()]
    progress("building the tokenizer", 0.0)
    tokenizer = read_tokenizer(file)
    tokenizer.write(out_dir, config)
    progress("building the tokenizer", 1.0)
    write_hf_config(out_dir, config)
    write_checkpoint(
        out_dir,
        config,
        _arrays(file, config, linears, progress),
        int4={linear.name: linear.format for linear in linears if linear.is_int4},
        int8={linear.name: linear.format for linear in linears if not linear.is_int4},
    )
    _log_summary(file, linears)


def _plan_linear(file: GGUFFile, name: str, size: tuple[int, int]) -> _Linear:
    prefix, _, stem = name.rpartition(".")
    if name == "embedding":
        parts: tuple[str, ...] = ("token_embd.weight",)
    elif name == "lm_head":
        parts = ("output.weight",)
    else:
        layer = prefix.removeprefix("layers.")
        parts = tuple(f"blk.{layer}.{part}.weight" for part in _PARTS[stem])
    for part in parts:
        require_readable(file, part)
    is_int4 = stem in _PARTS and all(file.tensor(part).kind.name in INT4_TYPES for part in parts)
    return _Linear(name, parts, is_int4, LinearFormat(*size, GROUP_SIZE))


def _arrays(
    file: GGUFFile, config: ModelConfig, linears: list[_Linear], progress: Progress
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every tensor of the native checkpoint, in the order of the file."""
    total = sum(_stored_bytes(file, linear) for linear in linears)
    done = 0
    for linear in linears:
        progress("converting the weights", done / total)
        done += _stored_bytes(file, linear)
        prefix, _, stem = linear.name.rpartition(".")
        layer = prefix.removeprefix("layers.")
        if stem == "qkv":
            yield f"{prefix}.attention_norm", _vector(file, f"blk.{layer}.attn_norm.weight")
        if stem == "gate_up":
            yield f"{prefix}.mlp_norm", _vector(file, f"blk.{layer}.ffn_norm.weight")
        yield from _linear_arrays(file, config, linear)
        if stem == "qkv" and config.attention_bias:
            yield f"{linear.name}.bias", _qkv_bias(file, config, layer)
    yield "final_norm", _vector(file, "output_norm.weight")
    progress("converting the weights", 1.0)


def _linear_arrays(file: GGUFFile, config: ModelConfig, linear: _Linear) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    read = int4_rows if linear.is_int4 else int8_rows
    parts = [_reordered(read(file, part), part, config) for part in linear.parts]
    if linear.name.endswith("gate_up"):
        arrays: RowArrays = tuple(interleave_gate_up(gate, up) for gate, up in zip(*parts, strict=True))
    else:
        arrays = tuple(np.concatenate(same) if len(same) > 1 else same[0] for same in zip(*parts, strict=True))
    if linear.is_int4:
        yield linear.name, pack_int4(*arrays)
    else:
        yield f"{linear.name}.values", arrays[0]
        yield f"{linear.name}.scales", arrays[1]


def _reordered(arrays: RowArrays, part: str, config: ModelConfig) -> RowArrays:
    """Rows of q and k in rotate-half order, rows of anything else as they are."""
    num_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part.split(".")[-2])
    if num_heads is None:
        return arrays
    rows = rotate_half_rows(num_heads, config.head_dim)
    return tuple(array[rows] for array in arrays)


def rotate_half_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Which GGUF row each row of q or k comes from: GGUF has the D / 2 rotary pairs side by side (2i, 2i + 1), we have
    them half a head apart (i, i + D / 2)."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)


def _qkv_bias(file: GGUFFile, config: ModelConfig, layer: str) -> npt.NDArray[np.float32]:
    parts = []
    for part in _PARTS["qkv"]:
        name = f"blk.{layer}.{part}.bias"
        (bias,) = _reordered((_vector(file, name),), name, config)
        parts.append(bias)
    return np.concatenate(parts)


def _vector(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    vector = file.dequantized(name)
    if not np.isfinite(vector).all():
        raise ConversionError(f"{file.path.name}: tensor {name} has numbers that are infinite or NaN")
    return vector


def _stored_bytes(file: GGUFFile, linear: _Linear) -> int:
    return sum(file.tensor(part).num_bytes for part in linear.parts)


def _log_summary(file: GGUFFile, linears: list[_Linear]) -> None:
    """One line: how many tensors kept their weights, and which were rounded."""
    kinds = {part: file.tensor(part).kind.name for linear in linears if not linear.is_int4 for part in linear.parts}
    rounded = [f"{part}:{kind}" for part, kind in kinds.items() if kind not in LOSSLESS_INT8_TYPES]
    logger.info(
        "converted file=%s int4_linears=%d int8_linears=%d rounded_tensors=%d %s",
        file.path.name,
        sum(linear.is_int4 for linear in linears),
        sum(not linear.is_int4 for linear in linears),
        len(rounded),
        ",".join(rounded[:8]) + (",..." if len(rounded) > 8 else ""),
    )
