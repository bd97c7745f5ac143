"""The CPU backend, first correct version: plain numpy, slow."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.kernels.interface import Array, AttentionBatch, Int4Weight, Int8Weight, Mode, SamplingBatch
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout
from nibble.kernels.pack import dequantize_int4


class CPUKernels:
    """`Kernels` on the CPU. Arrays are numpy."""

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self._dense: dict[int, tuple[Array, Array]] = {}

    @property
    def device_name(self) -> str:
        return f"cpu: {self.num_threads} threads"

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = array
        return host

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def warm_up(self) -> None:
        pass

    def read_bandwidth(self) -> float:
        buffer = np.ones(1 << 26, np.uint8)
        start = time.perf_counter()
        buffer.view(np.uint64).max()
        return buffer.nbytes / (time.perf_counter() - start)

    def embedding(self, ids: Array, weight: Int8Weight) -> Array:
        rows = weight.values[ids].astype(np.float32)
        return rows * weight.scales[ids].astype(np.float32).repeat(weight.group_size, axis=1)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight

    def int4_linear(
        self, x: Array, weight: Int4Weight, bias: Array | None = None, residual: Array | None = None, *, mode: Mode
    ) -> Array:
        if id(weight.packed) not in self._dense:
            shape = (weight.out_features, weight.in_features, weight.group_size)
            self._dense[id(weight.packed)] = (weight.packed, dequantize_int4(np.asarray(weight.packed), *shape))
        return self._linear(x, self._dense[id(weight.packed)][1], bias, residual, mode)

    def int8_linear(
        self, x: Array, weight: Int8Weight, bias: Array | None = None, residual: Array | None = None, *, mode: Mode
    ) -> Array:
        if id(weight.values) not in self._dense:
            w = weight.values.astype(np.float32) * weight.scales.astype(np.float32).repeat(weight.group_size, axis=1)
            self._dense[id(weight.values)] = (weight.values, w)
        return self._linear(x, self._dense[id(weight.values)][1], bias, residual, mode)

    def _linear(self, x: Array, w: Array, bias: Array | None, residual: Array | None, mode: Mode) -> Array:
        if mode is Mode.DECODE:
            out = np.stack([w @ row for row in x]) if len(x) else np.empty((0, len(w)), np.float32)
        else:
            out = x @ w.T
        if bias is not None:
            out += bias
        if residual is None:
            return out
        residual += out
        return residual

    def rope_table(self, inverse_frequencies: list[float], num_positions: int, attention_factor: float) -> Array:
        angles = np.arange(num_positions, dtype=np.float64)[:, None] * np.array(inverse_frequencies, np.float64)
        return (np.stack((np.cos(angles), np.sin(angles)), axis=1) * attention_factor).astype(np.float32)

    def rope(self, qkv: Array, positions: Array, table: Array, layout: KVLayout) -> None:
        half = layout.head_dim // 2
        heads = qkv.reshape(qkv.shape[0], -1, 2, half)
        rotated = heads.shape[1] - layout.num_kv_heads
        cos, sin = table[positions, 0][:, None], table[positions, 1][:, None]
        first, second = heads[:, :rotated, 0].copy(), heads[:, :rotated, 1].copy()
        heads[:, :rotated, 0] = first * cos - second * sin
        heads[:, :rotated, 1] = second * cos + first * sin

    def append_kv(self, qkv: Array, slots: Array, kv_cache: Array, layout: KVLayout) -> None:
        d, num_kv_heads = layout.head_dim, layout.num_kv_heads
        kv = qkv[:, -2 * num_kv_heads * d :].reshape(len(qkv), 2, num_kv_heads, d)
        blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        shape = (kv_cache.shape[0], num_kv_heads, 2, BLOCK_SIZE)
        if layout.dtype is KVDtype.FP16:
            cache = kv_cache.view(np.float16).reshape(*shape, d)
            cache[blocks, :, :, offsets] = np.clip(kv, -65504, 65504).astype(np.float16).transpose(0, 2, 1, 3)
            return
        low, high = kv.min(axis=-1, keepdims=True), kv.max(axis=-1, keepdims=True)
        zero = np.clip(np.float32(0.5) * low + np.float32(0.5) * high, -65504, 65504).astype(np.float16)
        scale = np.minimum((high - low) / np.float32(255), 65504).astype(np.float16)
        with np.errstate(divide="ignore", invalid="ignore"):
            q = np.clip(np.rint((kv - zero.astype(np.float32)) / scale.astype(np.float32)), -128, 127)
        q = np.where(scale == 0, 0, q).astype(np.int8).view(np.uint8).transpose(0, 2, 1, 3)
        parameters = np.concatenate((scale, zero), axis=-1).view(np.uint8).transpose(0, 2, 1, 3)
        split = 2 * BLOCK_SIZE * d
        for t, (block, offset) in enumerate(zip(blocks, offsets, strict=True)):
            kv_cache[block, :, :split].reshape(num_kv_heads, 2, BLOCK_SIZE, d)[:, :, offset] = q[t]
            kv_cache[block, :, split:].reshape(num_kv_heads, 2, BLOCK_SIZE, 4)[:, :, offset] = parameters[t]

    def paged_attention(
        self, qkv: Array, kv_cache: Array, batch: AttentionBatch, layout: KVLayout, *, mode: Mode
    ) -> Array:
        d, num_kv_heads = layout.head_dim, layout.num_kv_heads
        num_heads = qkv.shape[1] // d - 2 * num_kv_heads
        q = qkv[:, : num_heads * d].reshape(len(qkv), num_kv_heads, -1, d) / np.sqrt(np.float32(d))
        out = np.empty_like(q)
        for s, context_len in enumerate(batch.context_lens.tolist()):
            start, stop = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
            tokens = _read_kv(kv_cache[batch.block_tables[s, : -(-context_len // BLOCK_SIZE)]], layout)
            for row in range(start, stop):
                k, v = tokens[:, :, : context_len - (stop - row) + 1].swapaxes(0, 1)  # (kv head, token, D)
                scores = q[row] @ k.swapaxes(1, 2)
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[row] = weights @ v / weights.sum(axis=-1, keepdims=True)
        return out.reshape(len(qkv), -1)

    def silu_and_mul(self, gate_up: Array) -> Array:
        runs = gate_up.reshape(len(gate_up), -1, 2, 8)
        gate = np.maximum(runs[:, :, 0], np.float32(-80))
        return (gate / (1 + np.exp(-gate)) * runs[:, :, 1]).reshape(len(gate_up), -1)

    def gather_rows(self, x: Array, rows: Array) -> Array:
        return x[rows]

    def add_to_logits(self, logits: Array, rows: Array, ids: Array, values: Array) -> None:
        np.add.at(logits, (rows, ids), values)

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        return np.array([_sample_row(row, batch, s) for s, row in enumerate(logits)], np.int32)


def _read_kv(blocks: Array, layout: KVLayout) -> Array:
    d = layout.head_dim
    shape = (*blocks.shape[:2], 2, BLOCK_SIZE, d)
    if layout.dtype is KVDtype.FP16:
        kv = blocks.view(np.float16).astype(np.float32).reshape(shape)
    else:
        split = 2 * BLOCK_SIZE * d
        q = np.ascontiguousarray(blocks[..., :split]).view(np.int8).astype(np.float32).reshape(shape)
        parameters = np.ascontiguousarray(blocks[..., split:]).view(np.float16).astype(np.float32)
        parameters = parameters.reshape(*shape[:-1], 2)
        kv = q * parameters[..., :1] + parameters[..., 1:]
    return kv.transpose(1, 2, 0, 3, 4).reshape(layout.num_kv_heads, 2, -1, d)


def _sample_row(row: Array, batch: SamplingBatch, s: int) -> int:
    if np.isnan(row).any() or not np.isfinite(row).any():
        return -1
    if batch.temperature[s] == 0:
        return int(row.argmax())
    row = row.astype(np.float64)
    p = np.exp((row - row.max()) / float(batch.temperature[s]))
    p /= p.sum()
    order = np.argsort(-row, kind="stable")
    if batch.top_k[s] > 0:
        order = order[: batch.top_k[s]]
    if batch.top_p[s] < 1:
        cumulative = np.cumsum(p[order]) / p[order].sum()
        order = order[: int(np.searchsorted(cumulative, float(batch.top_p[s]))) + 1]
    order = order[p[order] >= float(batch.min_p[s]) * p.max()]
    running = np.cumsum(p[order])
    u = _philox_uniform(int(batch.seeds[s]), int(batch.positions[s]))
    return int(order[min(int(np.searchsorted(running, u * running[-1], side="right")), len(order) - 1)])


def _philox_uniform(seed: int, position: int) -> float:
    c = [position & 0xFFFFFFFF, position >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [high >> 32 ^ c[1] ^ k[0], high & 0xFFFFFFFF, low >> 32 ^ c[3] ^ k[1], low & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return (c[0] >> 8) / 2**24
