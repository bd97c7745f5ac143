"""Keys whose channels are of like size: what INT8 KV blocks with one scale per token and head cut with less error.

Some models (Qwen2.5 above all) have a few channels of k a hundred times as large as the rest, and those set the scale
of all. Dividing rows of k by what the same rows of q are multiplied by leaves every attention score as it was. A factor
belongs to both channels of a rotary pair, since positions turn them into each other, and to all query heads of a kv
head; where k is normalised before it is rotated, it goes into the norms, which all heads share. Factors are powers of
two: stored integers stay, and scales, minima and biases lose nothing but what lies below fp16's normal numbers.

Factors are the root of a pair's size, not the size: that would make the channels of q as unlike as those of k were, and
the error of a score is that of a channel of k times q's. SmoothQuant (arXiv:2211.10438) and QServe (arXiv:2405.04532)
balance so by calibration; weights and biases tell enough here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nibble.engine.checkpoint.row_formats import chunks_of
from nibble.engine.checkpoint.source import Float16Rows, Floats, Int4Rows, RowFormat, Rows, Source

_TENSORS = re.compile(r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?P<which>[qk])_(?P<kind>proj|norm)\.")
# Of a head's largest pair: factors are within 2^5, and queries, which are fp16, far from its limit.
_LEAST_RELATIVE_SIZE = 2.0**-10
_LOSS = 2.0**-14  # of a row's largest weight, below fp16's normal numbers: an eighth of what activations are rounded by


class _Sizes(NamedTuple):
    """Mean squares of pairs that inputs of unit variance give, in the shape of `_of_layer`; q's are sums over heads."""

    q: Floats
    k: Floats


class SmoothKeySource:
    """A `Source` with the same function and smoother keys."""

    def __init__(self, original: Source) -> None:
        self._original = original
        self.label = original.label
        self.config = original.config
        self._factors: dict[int, Floats] = {}

    def floats(self, name: str, rows: slice = slice(None)) -> Floats:
        values, factors = self._original.floats(name, rows), self._row_factors(name)
        if factors is None:
            return values
        return values * factors[rows].reshape(-1, *[1] * (values.ndim - 1))

    def format(self, name: str) -> RowFormat:
        return self._original.format(name)

    def rows(self, name: str) -> Rows:
        rows, factors = self._original.rows(name), self._row_factors(name)
        return rows if factors is None else _multiplied(rows, factors)

    def column_order(self, name: str) -> npt.NDArray[np.int32] | None:
        return self._original.column_order(name)

    def stored_type(self, name: str) -> str:
        return self._original.stored_type(name)

    def stored_bytes(self, name: str) -> int:
        return self._original.stored_bytes(name)

    def write_tokenizer(self, directory: Path) -> None:
        self._original.write_tokenizer(directory)

    def _row_factors(self, name: str) -> Floats | None:
        """What the rows of a tensor are multiplied by; None: nothing changes."""
        match = _TENSORS.match(name)
        if match is None or (match["kind"] == "norm") != self.config.qk_norm:
            return None
        which, factors = match["which"], self._of_layer(int(match["layer"]))
        if (factors == 1).all():
            return None
        if which == "k":
            factors = np.reciprocal(factors)
        if self.config.qk_norm:
            return np.tile(factors[0], 2)
        return _per_row(factors, self.config.num_heads if which == "q" else self.config.num_kv_heads)

    def _of_layer(self, index: int) -> Floats:
        """By which q is multiplied and k divided: (num_kv_heads, D / 2), or (1, D / 2) of norms."""
        if index not in self._factors:
            with np.errstate(over="ignore", invalid="ignore"):  # weights beyond fp16 are refused where they are read
                sizes = self._sizes(index)
                factors = _balancing_factors(sizes.k)
                if not self.config.qk_norm:
                    factors = np.where(self._is_kept(index, factors), factors, np.float32(1))
                self._factors[index] = _useful(factors, sizes)
        return self._factors[index]

    def _sizes(self, index: int) -> _Sizes:
        q, k = (self._channel_sizes(f"model.layers.{index}.", which) for which in "qk")
        if self.config.qk_norm:
            q, k = q.sum(axis=0, keepdims=True), k.mean(axis=0, keepdims=True)
        q = q.reshape(len(k), -1, q.shape[-1]).sum(axis=1)
        return _Sizes(_of_pairs(q), _of_pairs(k))

    def _channel_sizes(self, prefix: str, which: str) -> Floats:
        """Mean squares before rotation, (heads, D)."""
        weight = self._original.floats(f"{prefix}self_attn.{which}_proj.weight")
        weight *= self._original.floats(f"{prefix}input_layernorm.weight")
        sizes: Floats = np.einsum("nk,nk->n", weight, weight)
        if self.config.attention_bias:
            sizes += self._original.floats(f"{prefix}self_attn.{which}_proj.bias") ** 2
        sizes = sizes.reshape(-1, self.config.head_dim)
        if self.config.qk_norm:
            sizes /= np.maximum(sizes.mean(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            sizes *= self._original.floats(f"{prefix}self_attn.{which}_norm.weight") ** 2
        return sizes

    def _is_kept(self, index: int, factors: Floats) -> npt.NDArray[np.bool_]:
        """Which pairs' rows of q and k fp16 holds after multiplication, (num_kv_heads, D / 2)."""
        is_kept = np.ones(factors.shape, np.bool_)
        for which, num_heads, each in (
            ("q", self.config.num_heads, factors),
            ("k", self.config.num_kv_heads, np.reciprocal(factors)),
        ):
            rows = self._original.rows(f"model.layers.{index}.self_attn.{which}_proj.weight")
            of_rows = _are_held(rows, _per_row(each, num_heads))
            is_kept &= of_rows.reshape(len(factors), -1, 2, factors.shape[1]).all(axis=(1, 2))
        return is_kept


def _of_pairs(channels: Floats) -> Floats:
    """(heads, D) -> (heads, D / 2): the sums of pairs, half a head apart."""
    half = channels.shape[-1] // 2
    pairs: Floats = channels[:, :half] + channels[:, half:]
    return pairs


def _balancing_factors(sizes: Floats) -> Floats:
    """Powers of two next to the roots of pairs' radii, of which a head's have the geometric mean 1."""
    largest = np.maximum(sizes.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    exponents = np.log2(np.maximum(sizes / largest, _LEAST_RELATIVE_SIZE**2)) / 2  # of radii
    exponents -= exponents.mean(axis=-1, keepdims=True)
    factors: Floats = np.exp2(np.rint(exponents / 2)).astype(np.float32)
    return factors


def _useful(factors: Floats, sizes: _Sizes) -> Floats:
    """Factors of the heads whose scores they make better, 1 for others: rounded to powers of two, some do harm."""

    def error(factors: Floats) -> Floats:
        """Of scores, squared: step of the head's scale, which its largest pair sets, times the query."""
        result: Floats = (sizes.k / factors**2).max(axis=-1) * (sizes.q * factors**2).sum(axis=-1)
        return result

    is_better = error(factors) < error(np.ones_like(factors))
    result: Floats = np.where(is_better[:, None], factors, np.float32(1))
    return result


def _per_row(factors: Floats, num_heads: int) -> Floats:
    """(num_kv_heads, D / 2) -> (num_heads * D,)."""
    return np.repeat(np.tile(factors, 2), num_heads // len(factors), axis=0).reshape(-1)


def _multiplied(rows: Rows, factors: Floats) -> Rows:
    by = factors.astype(np.float16)[:, None]
    if isinstance(rows, Float16Rows):
        return Float16Rows(rows.values * by)
    if isinstance(rows, Int4Rows):
        return Int4Rows(rows.q, rows.scale * by, rows.minimum * by)
    return rows._replace(scales=rows.scales * by)


def _are_held(rows: Rows, factors: Floats) -> npt.NDArray[np.bool_]:
    """Whether each row has the same weights when it is multiplied and divided again."""
    result = np.ones(len(factors), np.bool_)
    for array in rows if isinstance(rows, Float16Rows) else rows[1:]:
        for chunk in chunks_of(*array.shape):
            product = (array[chunk] * factors[chunk].astype(np.float16)[:, None]).astype(np.float32)
            before = array[chunk].astype(np.float32)
            error = np.abs(product / factors[chunk][:, None] - before).max(axis=1)
            result[chunk] &= error <= _LOSS * np.abs(before).max(axis=1)
    return result
