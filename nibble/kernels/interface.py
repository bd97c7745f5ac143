"""The operations a backend offers to the engine: arrays in, arrays out, no engine types.

THE documentation of each op: formula, shapes, dtypes, in place or new; from logits on, `sampling.py` is. `cpu/` is the
readable reference and the backend of a machine without a GPU; `cuda/` (CuPy RawKernels) implements the same protocol.
`Array` is whatever the backend's arrays are (numpy on CPU, CuPy on CUDA): all are C-contiguous unless said otherwise,
and the engine passes them around without naming the library.

Activations are new arrays unless said otherwise, see `temporaries`.

Symbols: T tokens of a step (all sequences' queries, concatenated), S sequences, H hidden size, N output features,
K input features, V vocabulary, D head_dim. Activations are float32 on CPU and float16 on CUDA; the residual stream
is float32 on both. Storage formats (INT4 tiles, INT8 rows, KV blocks) are specified in `layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from nibble.kernels.layout import KVLayout
from nibble.kernels.sampling import SamplingKernels

Array: TypeAlias = Any  # numpy.ndarray (cpu) or cupy.ndarray (cuda)


class Mode(Enum):
    """Which of two numerically different implementations an op may use. The caller chooses, never the shape.

    DECODE: exact and batch-invariant. A row's result is the same bit for bit whatever the other rows of the call are
    and however many there are (any T): a sequence generates the same tokens alone, in a batch of 64, and when another
    worker recomputes its generated tokens (which it does in this mode, many rows of one sequence at once).
    PREFILL: built for throughput on many rows (bf16 products with fp32 accumulation). For the same reason a row's
    result should not depend on how the prompt was cut into chunks: the order of additions along K and along the
    context is fixed by positions, not by T.
    """

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True)
class Int4Weight:
    """An INT4 matrix (out_features, in_features) in the tile layout of `layout.py`.

    w[n, k] = scale[n, k // group_size] * q[n, k] + minimum[n, k // group_size], q in 0..15, scale and minimum fp16.
    """

    packed: Array  # uint8 (layout.int4_num_bytes(out_features, in_features, group_size),)
    out_features: int
    in_features: int
    group_size: int  # 32, 64 or 128; divides in_features


@dataclass(frozen=True)
class Int8Weight:
    """An INT8 matrix: w[n, k] = scales[n, k // group_size] * values[n, k]. Symmetric, row-major."""

    values: Array  # int8 (out_features, in_features)
    scales: Array  # float16 (out_features, in_features // group_size)
    group_size: int  # a multiple of 16 that divides in_features; in_features itself means one scale per row

    @property
    def out_features(self) -> int:
        return int(self.values.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.values.shape[1])


@dataclass(frozen=True)
class Float16Weight:
    """A matrix that is not quantised."""

    values: Array  # float16 (out_features, in_features), in_features a multiple of 16

    @property
    def out_features(self) -> int:
        return int(self.values.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.values.shape[1])


Weight: TypeAlias = Int4Weight | Int8Weight | Float16Weight


@dataclass(frozen=True)
class KVChannels:
    """What a layer's int8-channel blocks need beside them, see `layout.py`. None goes with the other types."""

    parameters: Array  # float32 layout.channels_shape
    num_saturated: Array  # int64 (1,): grows by the values that saturate


@dataclass(frozen=True)
class AttentionBatch:
    """Which tokens of a step belong to which sequence, and where their keys and values live.

    Sequence s owns query rows query_starts[s]:query_starts[s + 1], which are the last of its context_lens[s]
    tokens (this step's included). Its token at position p lies in block block_tables[s, p // 64], slot p % 64.
    """

    query_starts: Array  # int32 (S + 1,)
    context_lens: Array  # int32 (S,)
    block_tables: Array  # int32 (S, max_blocks); entries past a sequence's last block are undefined
    window: int | None = None  # a query sees so many of the newest positions, its own included; None: all


@dataclass(frozen=True)
class AttentionStep:
    """What all layers of one forward pass share in `Kernels.attention`."""

    batch: AttentionBatch
    positions: Array  # int32 (T,)
    slots: Array  # int64 (T,), where each token's key and value go: block_id * 64 + offset
    rope_table: Array  # of `Kernels.rope_table`
    plan: Array | None  # of `Kernels.plan_attention` for this batch


class HostCopy(Protocol):
    """A copy from the device that is under way."""

    def wait(self) -> npt.NDArray[Any]:
        """The array, once it has arrived."""


class Kernels(SamplingKernels, Protocol):
    """One backend on one device. Not thread-safe: one caller at a time."""

    @property
    def device_name(self) -> str:
        """What the work runs on, for people: `cpu: Intel(R) Xeon(R), 2 threads`."""

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the memory that device arrays live in, now."""

    def to_device(self, array: npt.NDArray[Any]) -> Array:
        """The array on the device. The CPU backend returns its argument without a copy (a memory map stays one)."""

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """The array as numpy, after all work that writes it has finished."""

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """A new zero-filled array on the device. Raises MemoryError, as `to_device` does, where it does not fit."""

    def fit_workspace(self, step: Callable[[], None]) -> int:
        """Give the temporaries exactly the room that `step` needs; -> bytes. Call outside `temporaries`.

        `step` is called with as much workspace as there is, and may call anything. What was captured before must not
        be run any more. A backend that allocates temporaries one by one does nothing and says 0.
        Raises MemoryError where not even `step` fits; so does later an op for which the room does not suffice.
        """

    def num_prefill_tokens(self, num_prompt_tokens: int) -> int:
        """How many of a prompt's first tokens are to be computed in PREFILL mode; the others in DECODE mode, which may
        be faster for few tokens. The split depends on the prompt alone, so that its results depend on nothing else."""

    @property
    def is_asynchronous(self) -> bool:
        """Whether ops return before their work is done, so that the host can prepare the next step meanwhile."""

    def host_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Zero-filled host memory that copies to and from the device can use directly (page-locked on CUDA)."""

    def copy_to_device(self, source: npt.NDArray[Any], target: Array) -> None:
        """target[...] = source, same shape and dtype. source, a `host_buffer`, must stay unchanged until it arrived:
        until a `start_to_host` that came later has been waited for."""

    def copy_blocks(
        self, kv_cache: Array, swapped: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int32], *, to_host: bool
    ) -> None:
        """swapped[pairs[i, 1]] = kv_cache[:, pairs[i, 0]] for each i, or the other way round where to_host is False.

        kv_cache uint8 (num_layers, num_blocks, ...) of all layers; swapped uint8 (n, num_layers, ...) and pairs int32
        (m, 2), both a `host_buffer` or rows of one. No block is named twice. pairs must stay unchanged as the source of
        `copy_to_device` must; what the host finds in `swapped`, and when, is undefined.
        """

    def start_to_host(self, array: Array) -> HostCopy:
        """Begin to copy the array as it will be when all work before this call has finished."""

    def temporaries(self) -> AbstractContextManager[None]:
        """A scope: what ops return within it (not `zeros` and `to_device`) is invalid after it, its memory used anew.

        Ops return arrays of a workspace of fixed size on CUDA; the engine opens a scope per step and per layer.
        """

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A function that repeats what `step` does on the device, in one launch where the device has such a thing.

        `step` may call ops only (no `to_host`, `zeros`, `to_device`, nothing that depends on values) and is called
        here, at least once, with valid data in its buffers; the result reads and writes the same arrays.
        """

    def warm_up(self, layouts: Sequence[KVLayout] = ()) -> None:
        """Compile or load every kernel, so that no request pays for it; with layouts those alone that models with such
        KV blocks use, at least."""

    def read_bandwidth(self) -> float:
        """Bytes per second that the device reads from memory, measured: the roof of decode."""

    def supports(self, layout: KVLayout) -> bool:
        """Whether there is attention for such blocks."""

    def embedding(self, ids: Array, weight: Int8Weight | Float16Weight) -> Array:
        """Rows of the embedding table, dequantised. ids int32 (T,) -> new float32 (T, H)."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis. x (T, H), weight (H,), both float32 -> new (T, H)."""

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
        """x @ w.T + bias (+ residual). x (T, K), bias float32 (N,) -> new (T, N), accumulated in fp32.

        With `residual` float32 (T, N) the result is added to it in place and `residual` is returned. With `gated`
        (no residual then) the weight is a gate_up matrix and `silu_and_mul` of the product, (T, N / 2), is returned.
        See `Mode` for what a row's result may depend on.
        """

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
        """As `int4_linear`, for INT8 weights (linears that a checkpoint does not hold in 4 bits)."""

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
        """As `int4_linear`, for weights that are not quantised: what quantised ones are compared with."""

    def logits(self, x: Array, weight: Int8Weight | Float16Weight) -> Array:
        """x @ w.T of the lm_head: x (S, H) -> new float32 (S, V). Batch-invariant as in `Mode.DECODE`."""

    def norm_heads(self, qkv: Array, q_weight: Array, k_weight: Array, eps: float, layout: KVLayout) -> None:
        """`rms_norm` of each head of q, by q_weight, and of k, by k_weight, in place; weights float32 (D,).

        qkv as in `rope`, which comes after it.
        """

    def rope_table(self, inverse_frequencies: list[float], num_positions: int, attention_factor: float) -> Array:
        """Rotary table float32 (num_positions, 2, D / 2): cos and sin of p * inverse_frequencies, times the factor.

        Angles are computed in float64: at position 100k a float32 angle is off by 1e-2 radians.
        """

    def rope(self, qkv: Array, positions: Array, table: Array, layout: KVLayout) -> None:
        """Rotate q and k heads of qkv (T, (num_heads + 2 * num_kv_heads) * D) in place; positions int32 (T,).

        Halves are paired as in Hugging Face models: (x[i], x[i + D/2]) -> (x[i] cos - x[i + D/2] sin,
        x[i + D/2] cos + x[i] sin), i < D/2.
        """

    def append_kv(
        self, qkv: Array, slots: Array, kv_cache: Array, layout: KVLayout, channels: KVChannels | None = None
    ) -> None:
        """Quantise k and v of each token of qkv and write them to slot slots[t] = block_id * 64 + offset, int64 (T,).

        A token whose slot is below 0 is skipped. kv_cache uint8 (num_blocks, num_kv_heads, layout.head_block_bytes),
        one layer, written in place.
        """

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
        """Causal attention of this step's queries over the paged cache (this step's tokens were appended before), or
        over the last `batch.window` positions of it.

        Query head h reads KV head h // (num_heads / num_kv_heads); scores are scaled by 1 / sqrt(D); softmax and
        sums in fp32. Keys and values come from the cache alone, so that prefill, chunked prefill and decode see the
        same (quantised) numbers. Ragged: any mix of query lengths >= 1, in both modes. -> new (T, num_heads * D).
        """

    def plan_attention(self, batch: AttentionBatch, layout: KVLayout, num_tokens: int, *, mode: Mode) -> Array | None:
        """What `attention` wants to know of a batch of num_tokens queries once, not layer by layer; opaque.

        Made on the device out of the batch's arrays, so that a captured step makes it anew each time.
        """

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
        """`rope`, then `append_kv`, then `paged_attention`, in as few kernels as possible. qkv may be overwritten.

        -> new (T, num_heads * D).
        """

    def silu_and_mul(self, gate_up: Array) -> Array:
        """silu(gate) * up. gate_up (T, 2 * I) with gate and up interleaved as `layout.GATE_UP_INTERLEAVE` says
        -> new (T, I)."""

    def permute_columns(self, x: Array, order: Array) -> Array:
        """x[:, order]: x (T, K), order int32 (K,) -> new (T, K)."""

    def gather_rows(self, x: Array, rows: Array) -> Array:
        """x[rows]: x (T, H), rows int32 (S,) -> new (S, H)."""
