"""`Kernels` on one NVIDIA GPU (sm_80 and newer): arrays are CuPy's, ops are the launchers beside this file.

Ops return arrays of a workspace of fixed size (`arena.py`) and only enqueue work on one stream. Nothing here runs
CuPy's own kernels, which would be compiled at their first use. What each op computes is documented in `interface.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cupy
import cupyx
import numpy as np
import numpy.typing as npt

from nibble.kernels.cuda import (
    adjust_logits,
    append_kv,
    attention,
    capture,
    copy_blocks,
    copy_rows,
    embedding,
    float16_linear,
    gather_rows,
    int4_linear,
    int8_linear,
    logprobs,
    mask_logits,
    norm_heads,
    permute_columns,
    read_bandwidth,
    rms_norm,
    rope,
    sample,
    silu_and_mul,
    token_ids,
    upload,
    variants,
)
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.errors import OutOfMemoryError
from nibble.kernels.cuda.host_copy import HostCopies
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
)
from nibble.kernels.layout import BLOCK_SIZE, KVLayout
from nibble.kernels.sampling import AdjustmentBatch, SamplingBatch

# So far the decode kernels, which read INT4 weights once for 64 tokens, take a prompt's first token no longer than
# dequantised weights do when many prompts come together, and a fifth of the time when one comes alone.
MAX_DECODED_PROMPT_TOKENS = 128
DEFAULT_WORKSPACE_BYTES = 1 << 30
MIN_WORKSPACE_BYTES = 2 << 20  # the granularity of device memory


class CUDAKernels:
    """`Kernels` on one GPU. To be used in the thread that makes it: CuPy's current device and stream are a thread's."""

    def __init__(
        self, index: int = 0, workspace_bytes: int = DEFAULT_WORKSPACE_BYTES, kernel_cache: Path | None = None
    ) -> None:
        """index: among the devices CUDA shows this process. workspace_bytes: for what a step computes (`arena.py`).

        kernel_cache: where compiled kernels are kept, by default the user's cache directory.
        Raises CUDABackendError where the device is too old or the workspace does not fit.
        """
        self.device = Device(index, workspace_bytes, kernel_cache)
        self._copies = HostCopies()
        self._uploader = upload.Uploader()
        self._read_bandwidth: float | None = None

    @property
    def device_name(self) -> str:
        return f"cuda: {self.device.name}"

    def memory_info(self) -> tuple[int, int]:
        cupy.get_default_memory_pool().free_all_blocks()
        free_bytes, total_bytes = cupy.cuda.runtime.memGetInfo()
        return int(free_bytes), int(total_bytes)

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        source = np.ascontiguousarray(array)
        target = _allocate(array.shape, array.dtype)
        if source.nbytes >= upload.MIN_BYTES:
            self._uploader.upload(source.reshape(-1).view(np.uint8), target.data.ptr)
        elif source.nbytes:
            target.set(source, stream=self.device.stream)
            self.device.stream.synchronize()  # the caller may change or drop its array
        return target

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        assert array.flags.c_contiguous, "only C-contiguous arrays are copied"
        host: npt.NDArray[Any] = array.get(stream=self.device.stream)
        return host

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        array = _allocate(shape, np.dtype(dtype))
        array.data.memset_async(0, array.nbytes, self.device.stream)
        return array

    def fit_workspace(self, step: Callable[[], None]) -> int:
        arena = self.device.arena
        arena.resize(MIN_WORKSPACE_BYTES)
        # Half of what is free: modules and local memory, loaded at a kernel's first launch, need some of it too.
        arena.resize(max(MIN_WORKSPACE_BYTES, self.memory_info()[0] // 2))
        step()
        self.device.stream.synchronize()
        arena.resize(max(MIN_WORKSPACE_BYTES, arena.peak_bytes))
        return arena.num_bytes

    def num_prefill_tokens(self, num_prompt_tokens: int) -> int:
        # In whole blocks: all tokens of a KV block are computed in one mode. The rest has the token that is sampled.
        whole = (num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
        return whole if num_prompt_tokens > MAX_DECODED_PROMPT_TOKENS else 0

    @property
    def is_asynchronous(self) -> bool:
        return True

    def host_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        buffer: npt.NDArray[Any] = cupyx.zeros_pinned(shape, dtype)
        return buffer

    def copy_to_device(self, source: npt.NDArray[Any], target: Array) -> None:
        assert (source.shape, source.dtype) == (target.shape, target.dtype), "source and target must be alike"
        assert source.flags.c_contiguous, "only C-contiguous arrays are copied"
        assert target.flags.c_contiguous, "only C-contiguous arrays are copied"
        kind, stream = cupy.cuda.runtime.memcpyHostToDevice, self.device.stream
        cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.ctypes.data, source.nbytes, kind, stream.ptr)

    def copy_blocks(
        self, kv_cache: Array, swapped: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int32], *, to_host: bool
    ) -> None:
        copy_blocks.copy_blocks(self.device, kv_cache, swapped, pairs, to_host)

    def start_to_host(self, array: Array) -> HostCopy:
        return self._copies.start(array)

    def temporaries(self) -> AbstractContextManager[None]:
        return self.device.arena.scope()

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        return capture.capture(self.device, step)

    def warm_up(self, layouts: Sequence[KVLayout] = ()) -> None:
        loaded = {(stem, defines) for stem, defines, _ in self.device.resources}
        missing = [variant for variant in variants.variants_for(layouts) if variant not in loaded]
        for _, stem, defines, _ in variants.compile_all((self.device.architecture,), self.device.kernel_cache, missing):
            self.device.load(stem, defines)
        self._uploader.close()
        self.read_bandwidth()  # later, the KV cache may have all memory

    def read_bandwidth(self) -> float:
        if self._read_bandwidth is None:
            self._read_bandwidth = read_bandwidth.read_bandwidth(self.device)
        return self._read_bandwidth

    def gather_ids(self, ids: Array, latest: Array) -> Array:
        return token_ids.gather_ids(self.device, ids, latest)

    def scatter_ids(self, ids: Array, indices: Array, latest: Array) -> None:
        token_ids.scatter_ids(self.device, ids, indices, latest)

    def supports(self, layout: KVLayout) -> bool:
        return layout.head_dim in rope.HEAD_DIMS

    def embedding(self, ids: Array, weight: Int8Weight | Float16Weight) -> Array:
        return embedding.embedding(self.device, ids, weight)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return rms_norm.rms_norm(self.device, x, weight, eps)

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
        return int4_linear.int4_linear(self.device, x, weight, bias, residual, mode, gated)

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
        return int8_linear.int8_linear(self.device, x, weight, bias, residual, mode, gated)

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
        return float16_linear.float16_linear(self.device, x, weight, bias, residual, gated)

    def logits(self, x: Array, weight: Int8Weight | Float16Weight) -> Array:
        if isinstance(weight, Float16Weight):
            return float16_linear.logits(self.device, x, weight)
        return int8_linear.logits(self.device, x, weight)

    def norm_heads(self, qkv: Array, q_weight: Array, k_weight: Array, eps: float, layout: KVLayout) -> None:
        norm_heads.norm_heads(self.device, qkv, q_weight, k_weight, eps, layout)

    def rope_table(self, inverse_frequencies: list[float], num_positions: int, attention_factor: float) -> Array:
        return rope.rope_table(self.device, inverse_frequencies, num_positions, attention_factor)

    def rope(self, qkv: Array, positions: Array, table: Array, layout: KVLayout) -> None:
        rope.rope(self.device, qkv, positions, table, layout)

    def append_kv(
        self, qkv: Array, slots: Array, kv_cache: Array, layout: KVLayout, channels: KVChannels | None = None
    ) -> None:
        append_kv.append_kv(self.device, qkv, slots, kv_cache, layout, channels)

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
        return attention.paged_attention(self.device, qkv, kv_cache, batch, layout, channels, mode)

    def plan_attention(self, batch: AttentionBatch, layout: KVLayout, num_tokens: int, *, mode: Mode) -> Array | None:
        return attention.plan_attention(self.device, batch, layout, num_tokens, mode)

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
        return attention.attention(self.device, qkv, kv_cache, step, layout, channels, mode)

    def silu_and_mul(self, gate_up: Array) -> Array:
        return silu_and_mul.silu_and_mul(self.device, gate_up)

    def gather_rows(self, x: Array, rows: Array) -> Array:
        return gather_rows.gather_rows(self.device, x, rows)

    def permute_columns(self, x: Array, order: Array) -> Array:
        return permute_columns.permute_columns(self.device, x, order)

    def copy_rows(self, x: Array, wanted: Array) -> Array:
        return copy_rows.copy_rows(self.device, x, wanted)

    def adjust_logits(self, logits: Array, slots: Array, adjustment: AdjustmentBatch) -> None:
        adjust_logits.adjust_logits(self.device, logits, slots, adjustment)

    def mask_logits(self, logits: Array, masks: Array, mask_rows: Array) -> None:
        mask_logits.mask_logits(self.device, logits, masks, mask_rows)

    def logprobs(self, logits: Array, ids: Array, num_logprobs: Array, out: Array, out_rows: Array) -> None:
        logprobs.logprobs(self.device, logits, ids, num_logprobs, out, out_rows)

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        return sample.sample(self.device, logits, batch)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> cupy.ndarray:
    """Memory that stays the caller's. Raises OutOfMemoryError."""
    try:
        return cupy.empty(shape, dtype)
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise OutOfMemoryError(str(error)) from error
