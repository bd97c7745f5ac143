"""`Kernels` on the CPU: arrays are NumPy's, ops are compiled by Numba and share one pool of threads.

Weights may be read-only memory maps; they are handed to compiled code by address, so that no op is compiled twice for
them. Activations are C-contiguous float32. What each op computes is documented in `interface.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nibble.kernels.cpu import (
    adjust_logits,
    amx,
    append_kv,
    bf16_linear,
    copy_blocks,
    digit_linear,
    digit_tiles,
    digits,
    embedding,
    float16_linear,
    gather_rows,
    int4_linear,
    int8_linear,
    logprobs,
    mask_logits,
    norm_heads,
    paged_attention,
    read_bandwidth,
    rms_norm,
    rope,
    sample,
    silu_and_mul,
    tile_attention,
)
from nibble.kernels.cpu.machine import cpu_model, usable_cpus
from nibble.kernels.cpu.malloc import keep_freed_memory
from nibble.kernels.cpu.thread_pool import ThreadPool
from nibble.kernels.cpu.vector_ir import LANES
from nibble.kernels.cpu.warm_up import warm_up
from nibble.kernels.interface import (
    Array,
    AttentionBatch,
    AttentionStep,
    Float16Weight,
    HostCopy,
    Int4Weight,
    Int8Weight,
    KVChannels,
    Mode,
    Weight,
)
from nibble.kernels.layout import KVDtype, KVLayout
from nibble.kernels.sampling import AdjustmentBatch, SamplingBatch

HEAD_DIM_STEP = 2 * LANES


@dataclass(frozen=True)
class _FinishedCopy:
    array: npt.NDArray[Any]

    def wait(self) -> npt.NDArray[Any]:
        return self.array


class CPUKernels:
    """`Kernels` on the CPUs this process may use, or on num_threads threads."""

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or usable_cpus()
        keep_freed_memory()
        self._threads = ThreadPool(self.num_threads)
        self._pool = self._threads.state
        self._addresses: dict[int, int] = {}
        self._tile_config = amx.tile_config() if amx.is_available() else None
        self.has_vnni = digit_tiles.is_available()

    def close(self) -> None:
        """Stop the threads; no op may be called any more."""
        self._threads.close()

    @property
    def device_name(self) -> str:
        return f"cpu: {cpu_model()}, {self.num_threads} threads"

    def memory_info(self) -> tuple[int, int]:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free_kib, total_kib = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
        return free_kib * 1024, total_kib * 1024

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = array
        return host

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return np.zeros(shape, dtype)

    def fit_workspace(self, step: Callable[[], None]) -> int:
        return 0

    def num_prefill_tokens(self, num_prompt_tokens: int) -> int:
        return num_prompt_tokens

    @property
    def is_asynchronous(self) -> bool:
        return False

    def host_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.zeros(shape, dtype)

    def copy_to_device(self, source: npt.NDArray[Any], target: Array) -> None:
        target[...] = source

    def copy_blocks(
        self, kv_cache: Array, swapped: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int32], *, to_host: bool
    ) -> None:
        copy_blocks.copy_blocks(kv_cache, swapped, pairs, to_host)

    def start_to_host(self, array: Array) -> HostCopy:
        return _FinishedCopy(array.copy())

    def temporaries(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    def warm_up(self, layouts: Sequence[KVLayout] = ()) -> None:
        warm_up(self)

    def read_bandwidth(self) -> float:
        return read_bandwidth.read_bandwidth(self._pool)

    def gather_ids(self, ids: Array, latest: Array) -> Array:
        return np.where(ids < 0, np.maximum(latest[-1 - np.minimum(ids, -1)], 0), ids).astype(np.int32)

    def scatter_ids(self, ids: Array, indices: Array, latest: Array) -> None:
        latest[indices[indices >= 0]] = ids[indices >= 0]

    def supports(self, layout: KVLayout) -> bool:
        return layout.head_dim % HEAD_DIM_STEP == 0

    def embedding(self, ids: Array, weight: Int8Weight | Float16Weight) -> Array:
        out = np.empty((len(ids), weight.in_features), np.float32)
        if isinstance(weight, Float16Weight):
            embedding.embedding_float16(ids, self._address(weight.values), out)
            return out
        values, scales = self._address(weight.values), self._address(weight.scales)
        embedding.embedding(ids, values, scales, weight.group_size, out)
        return out

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        out = np.empty_like(x)
        rms_norm.rms_norm(self._pool, rms_norm.chunk_function.address, x, self._address(weight), eps, out)
        return out

    def int4_linear(
        self,
        x: Array,
        weight: Int4Weight,
        bias: Array | None = None,
        residual: Array | None = None,
        *,
        mode: Mode,
        gated: bool = False,
    ) -> Array:
        assert not (gated and residual is not None), "a gated linear has no residual"
        out = _linear_out(x, weight, residual)
        packed, bias_address, add = self._address(weight.packed), self._optional_address(bias), residual is not None
        if len(x) == 0:
            pass
        elif mode is Mode.PREFILL and self._tile_config is not None:
            function = bf16_linear.int4_chunk_function.address
            bf16_linear.bf16_linear(
                self._pool, function, self._tile_config, x, packed, 0, weight.group_size, bias_address, add, out
            )
        elif self.has_vnni:
            function = digit_linear.int4_chunk_function.address
            digit_linear.digit_linear(self._pool, function, x, packed, 0, weight.group_size, bias_address, add, out)
        else:
            function = int4_linear.chunk_function.address
            int4_linear.int4_gemv(self._pool, function, x, packed, weight.group_size, bias_address, add, out)
        return self.silu_and_mul(out) if gated else out

    def int8_linear(
        self,
        x: Array,
        weight: Int8Weight,
        bias: Array | None = None,
        residual: Array | None = None,
        *,
        mode: Mode,
        gated: bool = False,
    ) -> Array:
        assert not (gated and residual is not None), "a gated linear has no residual"
        out = _linear_out(x, weight, residual)
        values, scales = self._address(weight.values), self._address(weight.scales)
        bias_address, add = self._optional_address(bias), residual is not None
        if len(x) == 0:
            pass
        elif mode is Mode.PREFILL and self._tile_config is not None and weight.group_size % amx.TILE_DEPTH == 0:
            function = bf16_linear.int8_chunk_function.address
            bf16_linear.bf16_linear(
                self._pool, function, self._tile_config, x, values, scales, weight.group_size, bias_address, add, out
            )
        elif self.has_vnni and weight.group_size % digits.BLOCK == 0:
            function = digit_linear.int8_chunk_function.address
            digit_linear.digit_linear(
                self._pool, function, x, values, scales, weight.group_size, bias_address, add, out
            )
        else:
            function = int8_linear.chunk_function.address
            int8_linear.int8_gemv(self._pool, function, x, values, scales, weight.group_size, bias_address, add, out)
        return self.silu_and_mul(out) if gated else out

    def float16_linear(
        self,
        x: Array,
        weight: Float16Weight,
        bias: Array | None = None,
        residual: Array | None = None,
        *,
        mode: Mode,
        gated: bool = False,
    ) -> Array:
        assert not (gated and residual is not None), "a gated linear has no residual"
        out = _linear_out(x, weight, residual)
        function, values = float16_linear.chunk_function.address, self._address(weight.values)
        add = residual is not None
        if len(x):
            float16_linear.float16_gemv(self._pool, function, x, values, self._optional_address(bias), add, out)
        return self.silu_and_mul(out) if gated else out

    def logits(self, x: Array, weight: Int8Weight | Float16Weight) -> Array:
        if isinstance(weight, Float16Weight):
            return self.float16_linear(x, weight, mode=Mode.DECODE)
        return self.int8_linear(x, weight, mode=Mode.DECODE)

    def norm_heads(self, qkv: Array, q_weight: Array, k_weight: Array, eps: float, layout: KVLayout) -> None:
        function, weights = norm_heads.chunk_function.address, (self._address(q_weight), self._address(k_weight))
        norm_heads.norm_heads(self._pool, function, qkv, *weights, eps, layout.num_kv_heads, layout.head_dim)

    def rope_table(self, inverse_frequencies: list[float], num_positions: int, attention_factor: float) -> Array:
        return rope.rope_table(inverse_frequencies, num_positions, attention_factor)

    def rope(self, qkv: Array, positions: Array, table: Array, layout: KVLayout) -> None:
        function = rope.chunk_function.address
        rope.rope(self._pool, function, qkv, positions, self._address(table), layout.num_kv_heads, layout.head_dim)

    def append_kv(
        self, qkv: Array, slots: Array, kv_cache: Array, layout: KVLayout, channels: KVChannels | None = None
    ) -> None:
        function, shape = append_kv.chunk_function.address, self._kv_shape(layout, channels)
        num_saturated = append_kv.append_kv(self._pool, function, qkv, slots, kv_cache, *shape)
        if channels is not None:
            channels.num_saturated[0] += num_saturated

    def paged_attention(
        self,
        qkv: Array,
        kv_cache: Array,
        batch: AttentionBatch,
        layout: KVLayout,
        channels: KVChannels | None = None,
        *,
        mode: Mode,
    ) -> Array:
        kv_columns = 2 * layout.num_kv_heads * layout.head_dim
        out = np.empty((len(qkv), qkv.shape[1] - kv_columns), np.float32)
        shape = self._kv_shape(layout, channels)
        sequences = (batch.query_starts, batch.context_lens, batch.block_tables, batch.window or 0)
        if mode is Mode.PREFILL and self._tile_config is not None and layout.head_dim % amx.TILE_DEPTH == 0:
            function, config = tile_attention.chunk_function.address, self._tile_config
            tile_attention.tile_attention(self._pool, function, config, qkv, kv_cache, *sequences, *shape, out)
        else:
            function = paged_attention.chunk_function.address
            paged_attention.paged_attention(self._pool, function, qkv, kv_cache, *sequences, *shape, out)
        return out

    def plan_attention(self, batch: AttentionBatch, layout: KVLayout, num_tokens: int, *, mode: Mode) -> Array | None:
        return None

    def attention(
        self,
        qkv: Array,
        kv_cache: Array,
        step: AttentionStep,
        layout: KVLayout,
        channels: KVChannels | None = None,
        *,
        mode: Mode,
    ) -> Array:
        self.rope(qkv, step.positions, step.rope_table, layout)
        self.append_kv(qkv, step.slots, kv_cache, layout, channels)
        return self.paged_attention(qkv, kv_cache, step.batch, layout, channels, mode=mode)

    def silu_and_mul(self, gate_up: Array) -> Array:
        out = np.empty((len(gate_up), gate_up.shape[1] // 2), np.float32)
        silu_and_mul.silu_and_mul(self._pool, silu_and_mul.chunk_function.address, gate_up, out)
        return out

    def gather_rows(self, x: Array, rows: Array) -> Array:
        return gather_rows.gather_rows(x, rows)

    def permute_columns(self, x: Array, order: Array) -> Array:
        return np.take(x, order, axis=1)

    def copy_rows(self, x: Array, wanted: Array) -> Array:
        out = np.empty_like(x)
        out[wanted >= 0] = x[wanted >= 0]
        return out

    def adjust_logits(self, logits: Array, slots: Array, adjustment: AdjustmentBatch) -> None:
        adjust_logits.adjust_logits(logits, slots, adjustment)

    def mask_logits(self, logits: Array, masks: Array, mask_rows: Array) -> None:
        mask_logits.mask_logits(logits, masks, mask_rows)

    def logprobs(self, logits: Array, ids: Array, num_logprobs: Array, out: Array, out_rows: Array) -> None:
        logprobs.logprobs(logits, ids, num_logprobs, out, out_rows)

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        out = np.empty(len(logits), np.int32)
        sample.sample(
            self._pool,
            sample.chunk_function.address,
            logits,
            batch.temperature,
            batch.top_k,
            batch.top_p,
            batch.min_p,
            batch.seeds,
            batch.positions,
            out,
        )
        return out

    def _kv_shape(self, layout: KVLayout, channels: KVChannels | None) -> tuple[int, int, bool, int]:
        """What the ops over KV blocks want to know of them."""
        assert (layout.dtype is KVDtype.INT8_CHANNEL) == (channels is not None), "channels go with int8-channel blocks"
        parameters = None if channels is None else channels.parameters
        assert parameters is None or parameters.shape == layout.channels_shape, "the channels are of another layout"
        is_float16 = layout.dtype is KVDtype.FP16
        return layout.num_kv_heads, layout.head_dim, is_float16, self._optional_address(parameters)

    def _optional_address(self, array: Array | None) -> int:
        return 0 if array is None else self._address(array)

    def _address(self, weight: Array) -> int:
        """Where a weight's bytes are. Kept per array: asking NumPy takes as long as a small op."""
        address = self._addresses.get(id(weight))
        if address is None:
            assert weight.flags.c_contiguous, "weights must be C-contiguous"
            address = self._addresses[id(weight)] = int(weight.ctypes.data)
            weakref.finalize(weight, self._addresses.pop, id(weight), None)
        return address


def _linear_out(x: Array, weight: Weight, residual: Array | None) -> Array:
    assert x.shape[1] == weight.in_features, f"x has {x.shape[1]} columns, the weight {weight.in_features}"
    if residual is None:
        return np.empty((len(x), weight.out_features), np.float32)
    assert residual.shape == (len(x), weight.out_features), f"residual has shape {residual.shape}"
    return residual
