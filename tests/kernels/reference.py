"""Every op in float64 numpy, straight from `interface.py` and `layout.py`: what the backends are tested against."""

from __future__ import annotations

import numpy as np
from kv_channels import channel_parameters

from nibble.kernels.interface import AttentionBatch
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout
from nibble.kernels.sampling import SamplingBatch

FP16_MAX = 65504.0


def int8_matrix(values: np.ndarray, scales: np.ndarray, group_size: int) -> np.ndarray:
    return values.astype(np.float64) * scales.astype(np.float64).repeat(group_size, axis=1)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def norm_heads(qkv: np.ndarray, q_weight: np.ndarray, k_weight: np.ndarray, eps: float, layout: KVLayout) -> np.ndarray:
    heads = qkv.astype(np.float64).reshape(len(qkv), qkv.shape[1] // layout.head_dim, layout.head_dim)
    q, k = slice(0, heads.shape[1] - 2 * layout.num_kv_heads), slice(-2 * layout.num_kv_heads, -layout.num_kv_heads)
    heads[:, q] = rms_norm(heads[:, q], q_weight, eps)
    heads[:, k] = rms_norm(heads[:, k], k_weight, eps)
    return heads.reshape(qkv.shape)


def rope(qkv: np.ndarray, positions: np.ndarray, table: np.ndarray, layout: KVLayout) -> np.ndarray:
    half = layout.head_dim // 2
    heads = qkv.astype(np.float64).reshape(qkv.shape[0], -1, 2, half)
    out = heads.copy()
    rotated = heads.shape[1] - layout.num_kv_heads
    cos = table[positions, 0].astype(np.float64)[:, None]
    sin = table[positions, 1].astype(np.float64)[:, None]
    first, second = heads[:, :rotated, 0], heads[:, :rotated, 1]
    out[:, :rotated, 0] = first * cos - second * sin
    out[:, :rotated, 1] = second * cos + first * sin
    return out.reshape(qkv.shape)


def quantize_token(x: np.ndarray) -> tuple[np.ndarray, np.float16, np.float16]:
    """One token and head of k or v: (q int8 (D,), scale, zero), in the fp32 arithmetic that layout.py states."""
    low, high = np.float32(x.min()), np.float32(x.max())
    zero = _to_fp16(np.float32(0.5) * low + np.float32(0.5) * high)
    scale = _to_fp16((high - low) / np.float32(255))
    if scale == 0:
        return np.zeros(x.shape, np.int8), scale, zero
    q = np.rint((x.astype(np.float32) - np.float32(zero)) / np.float32(scale))
    return np.clip(q, -128, 127).astype(np.int8), scale, zero


def quantize_channels(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, int]:
    """One token and head of k or v by its channels: (q int8 (D,), how many saturate)."""
    q = np.rint((x.astype(np.float32) - zero) / scale)
    saturates = ~((q >= -128) & (q <= 128))
    return np.clip(np.nan_to_num(q, nan=-128), -128, 127).astype(np.int8), int(saturates.sum())


def _to_fp16(value: np.ndarray) -> np.ndarray:
    return np.clip(value, -FP16_MAX, FP16_MAX).astype(np.float16)


def append_kv(qkv: np.ndarray, slots: np.ndarray, kv_cache: np.ndarray, layout: KVLayout) -> int:
    """With `channel_parameters` where the blocks want some. How many values saturated there."""
    num_saturated = 0
    d, num_kv_heads = layout.head_dim, layout.num_kv_heads
    kv = qkv[:, -2 * num_kv_heads * d :].reshape(len(qkv), 2, num_kv_heads, d)
    for t, slot in enumerate(slots):
        block, offset = divmod(int(slot), BLOCK_SIZE)
        if slot < 0:
            continue
        for which in range(2):
            for head in range(num_kv_heads):
                x, to = kv[t, which, head], kv_cache[block, head]
                if layout.dtype is KVDtype.INT8_CHANNEL:
                    q, count = quantize_channels(x, *channel_parameters(layout)[head, which])
                    to[(which * BLOCK_SIZE + offset) * d :][:d] = q.view(np.uint8)
                    num_saturated += count
                else:
                    _write_token(to, which, offset, x, layout)
    return num_saturated


def _write_token(block: np.ndarray, which: int, offset: int, x: np.ndarray, layout: KVLayout) -> None:
    d = layout.head_dim
    if layout.dtype is KVDtype.FP16:
        start = (which * BLOCK_SIZE + offset) * d * 2
        block[start : start + 2 * d] = _to_fp16(x).view(np.uint8)
        return
    q, scale, zero = quantize_token(x)
    start = (which * BLOCK_SIZE + offset) * d
    block[start : start + d] = q.view(np.uint8)
    start = 2 * BLOCK_SIZE * d + (which * BLOCK_SIZE + offset) * 4
    block[start : start + 4] = np.array([scale, zero]).view(np.uint8)


def read_kv(kv_cache: np.ndarray, layout: KVLayout) -> np.ndarray:
    """The cache as numbers: float64 (num_blocks, num_kv_heads, k | v, 64, D)."""
    d = layout.head_dim
    shape = (*kv_cache.shape[:2], 2, BLOCK_SIZE, d)
    if layout.dtype is KVDtype.FP16:
        return kv_cache.view(np.float16).astype(np.float64).reshape(shape)
    q = np.ascontiguousarray(kv_cache[..., : 2 * BLOCK_SIZE * d]).view(np.int8).astype(np.float64).reshape(shape)
    if layout.dtype is KVDtype.INT8_CHANNEL:
        scale, zero = channel_parameters(layout).astype(np.float64).transpose(2, 0, 1, 3)[..., None, :]
        return q * scale + zero
    parameters = np.ascontiguousarray(kv_cache[..., 2 * BLOCK_SIZE * d :]).view(np.float16).astype(np.float64)
    parameters = parameters.reshape(*kv_cache.shape[:2], 2, BLOCK_SIZE, 2)
    return q * parameters[..., :1] + parameters[..., 1:]


def paged_attention(qkv: np.ndarray, kv_cache: np.ndarray, batch: AttentionBatch, layout: KVLayout) -> np.ndarray:
    d, num_kv_heads = layout.head_dim, layout.num_kv_heads
    num_heads = qkv.shape[1] // d - 2 * num_kv_heads
    q = qkv[:, : num_heads * d].astype(np.float64).reshape(len(qkv), num_heads, d)
    kv = read_kv(kv_cache, layout)
    out = np.empty_like(q)
    for s, context_len in enumerate(batch.context_lens):
        start, stop = int(batch.query_starts[s]), int(batch.query_starts[s + 1])
        blocks = batch.block_tables[s, : -(-int(context_len) // BLOCK_SIZE)]
        tokens = kv[blocks].transpose(1, 2, 0, 3, 4).reshape(num_kv_heads, 2, -1, d)  # (kv head, k | v, token, D)
        for row in range(start, stop):
            visible = int(context_len) - (stop - row) + 1
            for head in range(num_heads):
                oldest = max(0, visible - (batch.window or visible))
                k, v = tokens[head * num_kv_heads // num_heads, :, oldest:visible]
                scores = k @ q[row, head] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ v / weights.sum()
    return out.reshape(len(qkv), -1)


def silu_and_mul(gate_up: np.ndarray) -> np.ndarray:
    runs = gate_up.astype(np.float64).reshape(len(gate_up), gate_up.shape[1] // 16, 2, 8)
    gate, up = runs[:, :, 0], runs[:, :, 1]
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, 0
        return (gate / (1 + np.exp(-gate)) * up).reshape(len(gate_up), gate_up.shape[1] // 2)


def philox_uniform(seed: int, position: int) -> float:
    """u in [0, 1) from the first word of Philox4x32-10 (Salmon et al., "Parallel random numbers", 2011)."""
    return (philox([position & 0xFFFFFFFF, position >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[0] >> 8) / 2**24


def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            high >> 32 ^ c[1] ^ k[0],
            high & 0xFFFFFFFF,
            low >> 32 ^ c[3] ^ k[1],
            low & 0xFFFFFFFF,
        ]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def sample(logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    return np.array([_sample_row(row, batch, s) for s, row in enumerate(logits)], np.int32)


def _sample_row(logits: np.ndarray, batch: SamplingBatch, s: int) -> int:
    logits = logits.astype(np.float64)
    if np.isnan(logits).any() or not np.isfinite(logits).any():
        return -1
    if batch.temperature[s] == 0:
        return int(logits.argmax())
    z = (logits - logits.max()) / float(batch.temperature[s])
    p = np.exp(z) / np.exp(z).sum()
    order = np.lexsort((np.arange(len(p)), -logits))
    if batch.top_k[s] > 0:
        order = order[: batch.top_k[s]]
    if batch.top_p[s] < 1:
        cumulative = np.cumsum(p[order]) / p[order].sum()
        order = order[: int(np.searchsorted(cumulative, float(batch.top_p[s]))) + 1]
    order = order[p[order] >= float(batch.min_p[s]) * p.max()]
    u = philox_uniform(int(batch.seeds[s]), int(batch.positions[s]))
    running = np.cumsum(p[order])
    return int(order[min(int(np.searchsorted(running, u * running[-1], side="right")), len(order) - 1)])
