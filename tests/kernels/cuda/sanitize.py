"""`python -m tests.kernels.cuda.sanitize [case ...]`: every kernel on small odd shapes, for compute-sanitizer.

`make sanitize-gpu` runs it under each of the sanitizer's tools, which find what tests of results do not: accesses out
of bounds that hit a neighbour, races that happen to end well. Every array is an allocation of its own here, for the
tools know allocations alone: no pool, no workspace. Results are tested elsewhere; here they only have to be finite.

Exits with 1 where a kernel of the package was not launched.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt

from nibble.kernels.cuda import add_bias, gemm, int4_dequantize, int4_linear, int8_dequantize, read_bandwidth
from nibble.kernels.cuda.arena import Arena
from nibble.kernels.cuda.backend import CUDAKernels
from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.gemm import multiply
from nibble.kernels.cuda.launch import Kernel
from nibble.kernels.cuda.rope import HEAD_DIMS
from nibble.kernels.cuda.variants import compile_all
from nibble.kernels.interface import (
    AttentionBatch,
    AttentionStep,
    Float16Weight,
    Int4Weight,
    Int8Weight,
    KVChannels,
    Mode,
)
from nibble.kernels.layout import KVDtype, KVLayout
from nibble.kernels.pack import pack_int4
from nibble.kernels.sampling import LOGPROB_WORDS, AdjustmentBatch, SamplingBatch
from nibble.kernels.slots import SlotContent, SlotLayout, mask_words
from tests.kernels.cuda.paged import attention_batch, sequences, slots_of

TOKENS = (1, 9, 17, 33, 65, 130)  # one of each kernel of a linear, and more than any takes at once
TALL = 32_784  # rows from which on an INT8 matrix has other kernels


class OwnAllocations(Arena):
    """Arrays that live until `release`."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self._kept: list[cupy.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> cupy.ndarray:
        memory = cupy.cuda.Memory(max(math.prod(shape) * np.dtype(dtype).itemsize, 1))
        self._kept.append(cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0)))
        return self._kept[-1]

    def release(self) -> None:
        self._kept.clear()


def multiply_into_zeros(x: cupy.ndarray, matrix: cupy.ndarray, out: cupy.ndarray, first: int, accumulate: bool) -> None:
    """`gemm.multiply`. initcheck does not see what cuBLASLt's kernels write by bulk copies."""
    if first == 0 and not accumulate:
        out.data.memset_async(0, out.nbytes)
    multiply(x, matrix, out, first, accumulate)


class Sanitized:
    """The backend, and which of its kernels were launched."""

    def __init__(self) -> None:
        cupy.cuda.set_allocator(None)
        gemm.multiply = multiply_into_zeros
        self.kernels = CUDAKernels(workspace_bytes=1 << 20)
        self.device = self.kernels.device
        self.arena = self.device.arena = OwnAllocations()
        self.launched: set[tuple[str, Defines, str]] = set()
        self._kernel = self.device.kernel
        self.device.kernel = self._record  # type: ignore[method-assign]
        self.rng = np.random.default_rng(0)

    def _record(self, stem: str, name: str, defines: Defines = ()) -> Kernel:
        self.launched.add((stem, defines, name))
        return self._kernel(stem, name, defines)

    def missing(self) -> list[tuple[str, Defines, str]]:
        every = {
            (stem, defines, name)
            for _, stem, defines, cubin in compile_all((self.device.architecture,))
            for name in cubin.resources
        }
        return sorted(every - self.launched)

    def array(self, values: Any, dtype: npt.DTypeLike) -> cupy.ndarray:
        return self.kernels.to_device(np.asarray(values, dtype))

    def normal(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float16) -> cupy.ndarray:
        return self.array(np.clip(self.rng.standard_normal(shape), -4, 4), dtype)

    def check(self, *arrays: cupy.ndarray) -> None:
        for array in arrays:
            assert np.isfinite(self.kernels.to_host(array)).all()

    def int4_weight(self, rows: int, columns: int, group_size: int) -> Int4Weight:
        q = self.rng.integers(0, 16, (rows, columns), dtype=np.uint8)
        scale = (self.rng.random((rows, columns // group_size)) * 0.02).astype(np.float16)
        return Int4Weight(self.array(pack_int4(q, scale, -8 * scale), np.uint8), rows, columns, group_size)

    def int8_weight(self, rows: int, columns: int, group_size: int) -> Int8Weight:
        values = self.rng.integers(-128, 128, (rows, columns))
        scales = self.rng.random((rows, columns // group_size)) * 0.01
        return Int8Weight(self.array(values, np.int8), self.array(scales, np.float16), group_size)

    def linear(self, op: Callable[..., cupy.ndarray], rows: int, columns: int, weight: Any, tokens: int) -> None:
        """All epilogues of a linear."""
        x, bias = self.normal((tokens, columns)), self.normal((rows,), np.float32)
        residual = self.normal((tokens, rows), np.float32)
        self.check(
            op(x, weight, bias, mode=Mode.DECODE),
            op(x, weight, None, residual, mode=Mode.DECODE),
            op(x, weight, mode=Mode.DECODE, gated=True),
        )


def int4(s: Sanitized) -> None:
    for rows, columns, group_size in ((80, 96, 32), (80, 320, 32), (144, 192, 64), (208, 384, 128), (80, 2048, 128)):
        weight = s.int4_weight(rows, columns, group_size)
        for tokens in TOKENS:
            s.linear(s.kernels.int4_linear, rows, columns, weight, tokens)
        s.check(int4_dequantize.int4_dequantize(s.device, weight, 64, rows - 64))


def int4_general(s: Sanitized) -> None:
    """On a device with a kernel of its own, the one of all others."""
    launchers, int4_linear.LAUNCHERS = int4_linear.LAUNCHERS, {}
    try:
        int4(s)
    finally:
        int4_linear.LAUNCHERS = launchers


def int8(s: Sanitized) -> None:
    for rows, columns, group_size in ((48, 96, 96), (80, 160, 32), (48, 144, 48), (48, 1536, 1536)):
        weight = s.int8_weight(rows, columns, group_size)
        for tokens in (1, 9, 40):
            s.linear(s.kernels.int8_linear, rows, columns, weight, tokens)
        s.check(int8_dequantize.int8_dequantize(s.device, weight, 3, rows - 3))
    for columns, group_size in ((48, 48), (64, 32), (48, 16)):
        weight = s.int8_weight(TALL, columns, group_size)
        for tokens in (1, 9, 17, 33, 65):
            s.check(s.kernels.logits(s.normal((tokens, columns)), weight))
        s.linear(s.kernels.int8_linear, TALL, columns, weight, 2)


def attention(s: Sanitized, head_dim: int) -> None:
    group_size, num_kv_heads = {64: (3, 2), 96: (1, 1), 128: (4, 2), 256: (2, 1)}[head_dim]
    for dtype in KVDtype:
        one_attention(s, KVLayout(num_kv_heads, head_dim, dtype), group_size)
    if head_dim == 64:
        one_attention(s, KVLayout(1, head_dim), 11)


def one_attention(s: Sanitized, layout: KVLayout, group_size: int) -> None:
    context_lens = [1, 64, 65, 300]
    table = s.kernels.rope_table([10000.0 ** (-2 * i / layout.head_dim) for i in range(layout.head_dim // 2)], 320, 1.0)
    channels = None
    if layout.dtype is KVDtype.INT8_CHANNEL:
        parameters = np.full(layout.channels_shape, 0.01)
        channels = KVChannels(s.array(parameters, np.float32), s.array([0], np.int64))
    num_columns = (group_size + 2) * layout.num_kv_heads * layout.head_dim
    for query_lens, mode, window in itertools.product(([1, 1, 1, 1], [1, 17, 1, 3]), Mode, (None, 100)):
        cache, tables = sequences(s.rng, context_lens, layout)
        batch = attention_batch(query_lens, context_lens, tables)
        positions, slots = slots_of(batch)
        arrays = (batch.query_starts, batch.context_lens, batch.block_tables)
        on_device = AttentionBatch(*(s.array(a, np.int32) for a in arrays), window)
        kv_cache, qkv = s.array(cache, np.uint8), s.normal((len(positions), num_columns))
        plan = s.kernels.plan_attention(on_device, layout, len(positions), mode=mode)
        step = AttentionStep(on_device, s.array(positions, np.int32), s.array(slots, np.int64), table, plan)
        s.check(s.kernels.attention(qkv, kv_cache, step, layout, channels, mode=mode))
        weights = s.normal((2, layout.head_dim), np.float32)
        s.kernels.norm_heads(qkv, weights[0], weights[1], 1e-5, layout)
        s.kernels.rope(qkv, step.positions, table, layout)
        s.kernels.append_kv(qkv, step.slots, kv_cache, layout, channels)
        s.check(s.kernels.paged_attention(qkv, kv_cache, on_device, layout, channels, mode=mode))


def sample(s: Sanitized) -> None:
    for rows, vocabulary in ((9, 1003), (3, 5), (3, 32_001), (1, 400_003)):
        i = np.arange(rows)
        batch = SamplingBatch(
            temperature=s.array(np.array([0.7, 0, 1, 1.7])[i % 4], np.float32),
            top_k=s.array(np.array([0, 50, 1])[i % 3], np.int32),
            top_p=s.array(np.array([0.9, 1])[i % 2], np.float32),
            min_p=s.array(np.array([0.05, 0, 0.5, 0, 0])[i % 5], np.float32),
            seeds=s.array(i, np.uint64),
            positions=s.array(i, np.int64),
        )
        logits = s.normal((rows, vocabulary), np.float32)  # whose end is no multiple of 16 bytes
        before = _adjust(s, logits, i)
        tokens = s.kernels.to_host(s.kernels.sample(logits, batch))
        assert ((tokens >= 0) & (tokens < vocabulary)).all()
        out = s.array(np.zeros((rows, LOGPROB_WORDS)), np.int32)
        ids, places = s.array(np.maximum(tokens, 0), np.int32), s.array(i, np.int32)
        s.kernels.logprobs(before, ids, s.array(np.full(rows, 20), np.int32), out, places)
        s.kernels.to_host(out)


def _adjust(s: Sanitized, logits: cupy.ndarray, i: np.ndarray) -> cupy.ndarray:
    """Everything that a slot and a mask can do to all rows but each third; a copy of the rows before."""
    rows, vocabulary = logits.shape
    layout = SlotLayout(vocabulary)
    content = SlotContent(
        repetition=1.2,
        frequency=0.5,
        min_tokens=9,
        stop_ids=[vocabulary - 1],
        biases=[(0, 1.0), (vocabulary - 1, -100.0)],
        bad_words=[[1], [0, 2, 2], [vocabulary - 2]],
        allowed=range(0, vocabulary, 2),
    )
    slots = np.zeros((rows, layout.num_words), np.int32)
    for slot in slots:
        layout.write(slot, content, [0, vocabulary - 1], [0, 2])
    where = s.array(np.where(i % 3, i, -1), np.int32)
    copy = s.kernels.copy_rows(logits, s.array(i, np.int32))
    adjustment = AdjustmentBatch(where, s.array(np.full(rows, 2), np.int32), s.array(i, np.int32), s.array(i, np.int64))
    s.kernels.adjust_logits(logits, s.array(slots, np.int32), adjustment)
    masks = np.full((rows, mask_words(vocabulary)), -1, np.int32)
    masks[:, 0] ^= 1 << 3
    s.kernels.mask_logits(logits, s.array(masks, np.int32), where)
    return copy


def small_ops(s: Sanitized) -> None:
    for size in (50, 577, 576, 8200):
        s.check(s.kernels.rms_norm(s.normal((3, size), np.float32), s.normal((size,), np.float32), 1e-5))
    rows = s.array([4, 0, 2], np.int32)
    for dtype, size in ((np.float16, 33), (np.float16, 8), (np.float32, 577), (np.float32, 4100)):
        s.check(s.kernels.gather_rows(s.normal((5, size), dtype), rows))
    for size, group_size in ((96, 32), (4112, 16)):
        s.check(s.kernels.embedding(rows, s.int8_weight(5, size, group_size)))
        s.check(s.kernels.embedding(rows, Float16Weight(s.normal((5, size)))))
    s.check(s.kernels.permute_columns(s.normal((3, 300)), s.array(s.rng.permutation(300), np.int32)))
    s.linear(s.kernels.float16_linear, 48, 96, Float16Weight(s.normal((48, 96))), 65)
    for columns in (33, 4100):
        s.kernels.copy_rows(s.normal((3, columns), np.float32), s.array([1, 0, 1], np.int32))
    cache, swapped = s.array(np.zeros((2, 3, 1, 4112)), np.uint8), s.kernels.host_buffer((2, 2, 1, 4112), np.uint8)
    pairs = s.kernels.host_buffer((2, 2), np.int32)
    pairs[:] = [[2, 0], [0, 1]]
    for to_host in (True, False):
        s.kernels.copy_blocks(cache, swapped, pairs, to_host=to_host)
    for tokens, columns in ((1, 16), (9, 192)):
        s.check(s.kernels.silu_and_mul(s.normal((tokens, columns))))
    latest = s.array([3, 5, -1], np.int32)
    s.check(s.kernels.gather_ids(s.array([-1, 2, -3], np.int32), latest))
    s.kernels.scatter_ids(rows, s.array([1, -1, 2], np.int32), latest)
    for dtype in (np.float16, np.float32):
        y = s.normal((3, 33), dtype)
        add_bias.add_bias(s.device, y, s.normal((33,), np.float32))
        s.check(y)
    read_bandwidth.measure(s.device, s.arena.empty((3 * read_bandwidth.RUN_BYTES,), np.uint8))


CASES: dict[str, Callable[[Sanitized], None]] = {
    "small_ops": small_ops,
    "sample": sample,
    "int8": int8,
    "int4": int4,
    "int4_general": int4_general,
    **{f"attention_{head_dim}": partial(attention, head_dim=head_dim) for head_dim in HEAD_DIMS},
}


@contextmanager
def timed(name: str) -> Iterator[None]:
    start_s = time.perf_counter()
    yield
    print(f"{name:14} {time.perf_counter() - start_s:6.1f} s", flush=True)  # noqa: T201  # a command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    chosen = parser.parse_args().cases or CASES
    if unknown := set(chosen) - set(CASES):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    with timed("start"):
        sanitized = Sanitized()
    for name in chosen:
        with timed(name):
            CASES[name](sanitized)
            sanitized.device.stream.synchronize()
            sanitized.arena.release()
    if set(chosen) == set(CASES) and sanitized.missing():
        sys.exit(f"kernels that were not launched: {sanitized.missing()}")


if __name__ == "__main__":
    main()
