"""Attention over the paged cache: against float64, alone or in a batch, fused or op by op, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import reference
from kv_channels import channels_of
from paged import attention_batch, poison_slots, sequences, slots_of

from nibble.kernels.interface import AttentionBatch, AttentionStep, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 63, 64, 65, 127, 1000, 4097, 256, 257, 300]
SHAPES = [(9, 3, 64), (4, 4, 96), (3, 1, 96), (8, 2, 128), (7, 1, 128), (16, 1, 128), (24, 2, 64), (2, 1, 256)]
every_shape = pytest.mark.parametrize(
    ("num_heads", "layout"),
    [
        pytest.param(heads, KVLayout(kv_heads, head_dim, dtype), id=f"{heads}-{kv_heads}-{head_dim}-{dtype}")
        for heads, kv_heads, head_dim in SHAPES
        for dtype in KVDtype
    ],
)


def tolerance(mode: Mode, layout: KVLayout) -> float:
    """Absolute, for |q|, |k|, |v| of about 1 and at most 4.

    fp16 rounds each weight (times the value's scale) by 2^-11 of itself, and so the output by at most 2^-11 of the
    largest value; the output is rounded once more. PREFILL rounds keys and values to fp16 as well, and blocks by
    channel have q times the keys' scales rounded: a score moves by up to 2^-11 sum(|q k|) / sqrt(D), about 2^-11 * 0.7
    sqrt(D) (errors of one sign: an upper bound), and its weight by that share. 2^-13: fp32.
    """
    rounding = 2.0**-11 * 4 * 2 + 2.0**-13
    if mode is Mode.DECODE and layout.dtype is not KVDtype.INT8_CHANNEL:
        return rounding
    return rounding + 4 * 2.0**-11 * (1 + 0.7 * layout.head_dim**0.5)


def on_device(kernels: CUDAKernels, batch: AttentionBatch) -> AttentionBatch:
    arrays = (batch.query_starts, batch.context_lens, batch.block_tables)
    return AttentionBatch(*(kernels.to_device(a) for a in arrays), batch.window)


def random_qkv(rng: np.random.Generator, num_tokens: int, num_heads: int, layout: KVLayout) -> np.ndarray:
    columns = (num_heads + 2 * layout.num_kv_heads) * layout.head_dim
    return np.clip(rng.standard_normal((num_tokens, columns)), -4, 4).astype(np.float16)


def attend(
    kernels: CUDAKernels, qkv: np.ndarray, cache: Any, batch: AttentionBatch, layout: KVLayout, mode: Mode
) -> np.ndarray:
    with kernels.temporaries():
        kernels.device.arena.poison(64 << 20)
        cache = kernels.to_device(cache) if isinstance(cache, np.ndarray) else cache
        arrays, channels = on_device(kernels, batch), channels_of(kernels, layout)
        out = kernels.paged_attention(kernels.to_device(qkv), cache, arrays, layout, channels, mode=mode)
        return np.array(kernels.to_host(out))


def expected_of(qkv: np.ndarray, cache: np.ndarray, batch: AttentionBatch, layout: KVLayout) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # the poison
        return reference.paged_attention(qkv, cache, batch, layout)


def assert_matches(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    num_heads: int,
    layout: KVLayout,
    query_lens: list[int],
    context_lens: list[int],
    mode: Mode,
    window: int | None = None,
) -> None:
    """Attention over random sequences of these lengths, against the reference. Blocks out of sight are poisoned."""
    cache, tables = sequences(rng, context_lens, layout)
    for table, query_len, context_len in zip(tables, query_lens, context_lens, strict=True):
        for block in table[: max(0, context_len - query_len + 1 - (window or context_len)) // BLOCK_SIZE]:
            poison_slots(cache, block, 0, layout)
    batch = replace(attention_batch(query_lens, context_lens, tables), window=window)
    qkv = random_qkv(rng, sum(query_lens), num_heads, layout)
    out = attend(kernels, qkv, cache, batch, layout, mode)
    assert np.abs(out - expected_of(qkv, cache, batch, layout)).max() <= tolerance(mode, layout)


@every_shape
def test_decode(kernels: CUDAKernels, rng: np.random.Generator, num_heads: int, layout: KVLayout) -> None:
    assert_matches(kernels, rng, num_heads, layout, [1] * len(LENGTHS), LENGTHS, Mode.DECODE)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8, 9, 12, 16])
@pytest.mark.parametrize("mode", Mode)
def test_group_sizes(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode, group_size: int) -> None:
    assert_matches(kernels, rng, 2 * group_size, KVLayout(2, 64), [1, 1, 30], [1, 300, 70], mode)


@pytest.mark.parametrize("mode", Mode)
@every_shape
def test_ragged_batch(
    kernels: CUDAKernels, rng: np.random.Generator, num_heads: int, layout: KVLayout, mode: Mode
) -> None:
    query_lens, context_lens = [1, 17, 1, 40, 5, 1, 150, 63], [1, 17, 64, 70, 200, 300, 150, 500]
    assert_matches(kernels, rng, num_heads, layout, query_lens, context_lens, mode)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("window", [1, 37, 64, 256, 300, 4096, 100_000])
@pytest.mark.parametrize(
    ("num_heads", "layout"),
    [(9, KVLayout(3, 64)), (8, KVLayout(2, 128)), (8, KVLayout(2, 128, KVDtype.FP16)), (2, KVLayout(1, 256))],
    ids=str,
)
def test_a_window_hides_what_is_older(
    kernels: CUDAKernels, rng: np.random.Generator, num_heads: int, layout: KVLayout, window: int, mode: Mode
) -> None:
    assert_matches(kernels, rng, num_heads, layout, [1] * len(LENGTHS), LENGTHS, mode, window)
    query_lens, context_lens = [1, 17, 1, 40, 5, 1, 150, 263, 1], [1, 17, 64, 70, 200, 700, 150, 500, 9000]
    assert_matches(kernels, rng, num_heads, layout, query_lens, context_lens, mode, window)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("window", [40, 100, 300])
def test_with_a_window_too_a_row_does_not_depend_on_the_others(
    kernels: CUDAKernels, rng: np.random.Generator, window: int, mode: Mode
) -> None:
    layout = KVLayout(3, 64)
    cache, tables = sequences(rng, [730], layout)
    on_gpu, qkv = kernels.to_device(cache), random_qkv(rng, 730, 9, layout)
    whole = attend(kernels, qkv, on_gpu, replace(attention_batch([730], [730], tables), window=window), layout, mode)
    for start, stop in ((0, 128), (128, 129), (129, 200), (200, 730)):
        batch = replace(attention_batch([stop - start], [stop], tables), window=window)
        out = attend(kernels, qkv[start:stop], on_gpu, batch, layout, mode)
        np.testing.assert_array_equal(out, whole[start:stop])


@pytest.mark.parametrize("dtype", KVDtype)
def test_long_prefill_chunk(kernels: CUDAKernels, rng: np.random.Generator, dtype: KVDtype) -> None:
    assert_matches(kernels, rng, 4, KVLayout(1, 128, dtype), [65, 130], [4097, 130], Mode.PREFILL)


@every_shape
def test_decode_row_does_not_depend_on_the_batch(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    num_heads: int,
    layout: KVLayout,
) -> None:
    context_lens = rng.integers(1, 1500, 64).tolist()
    cache, tables = sequences(rng, context_lens, layout)
    on_gpu = kernels.to_device(cache)
    qkv = random_qkv(rng, 64, num_heads, layout)
    together = attend(kernels, qkv, on_gpu, attention_batch([1] * 64, context_lens, tables), layout, Mode.DECODE)
    order = rng.permutation(64)
    shuffled = attention_batch([1] * 64, [context_lens[i] for i in order], tables[order])
    out = attend(kernels, qkv[order], on_gpu, shuffled, layout, Mode.DECODE)
    np.testing.assert_array_equal(out, together[order])
    for row in (0, 13, 63):
        alone = attention_batch([1], [context_lens[row]], tables[row : row + 1])
        out = attend(kernels, qkv[row : row + 1], on_gpu, alone, layout, Mode.DECODE)
        np.testing.assert_array_equal(out[0], together[row])


@pytest.mark.parametrize("batch_size", [4, 16, 33, 40, 64])
def test_decode_row_does_not_depend_on_how_rows_are_cut(
    kernels: CUDAKernels, rng: np.random.Generator, batch_size: int
) -> None:
    """Rows of the same length: thread blocks get halves of rows, whole rows or, with 33 and 40, whatever comes."""
    layout = KVLayout(8, 128)
    context_lens = [1000] * batch_size
    cache, tables = sequences(rng, context_lens, layout)
    on_gpu = kernels.to_device(cache)
    qkv = random_qkv(rng, batch_size, 32, layout)
    batch = attention_batch([1] * batch_size, context_lens, tables)
    together = attend(kernels, qkv, on_gpu, batch, layout, Mode.DECODE)
    error = np.abs(together - expected_of(qkv, cache, batch, layout))
    assert error.max() <= tolerance(Mode.DECODE, layout)
    for row in range(0, batch_size, 3):
        alone = attention_batch([1], [1000], tables[row : row + 1])
        out = attend(kernels, qkv[row : row + 1], on_gpu, alone, layout, Mode.DECODE)
        np.testing.assert_array_equal(out[0], together[row])


def test_decode_of_many_rows_per_sequence_equals_one_by_one(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences(rng, [700, 20], layout)
    on_gpu = kernels.to_device(cache)
    qkv = random_qkv(rng, 620, 4, layout)
    together = attend(kernels, qkv, on_gpu, attention_batch([600, 20], [700, 20], tables), layout, Mode.DECODE)
    for row, sequence, context_len in ((0, 0, 101), (300, 0, 401), (599, 0, 700), (600, 1, 1), (619, 1, 20)):
        alone = attention_batch([1], [context_len], tables[sequence : sequence + 1])
        out = attend(kernels, qkv[row : row + 1], on_gpu, alone, layout, Mode.DECODE)
        np.testing.assert_array_equal(out[0], together[row])


@every_shape
def test_prefill_row_does_not_depend_on_the_chunk(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    num_heads: int,
    layout: KVLayout,
) -> None:
    cache, tables = sequences(rng, [330], layout)
    on_gpu = kernels.to_device(cache)
    qkv = random_qkv(rng, 330, num_heads, layout)
    whole = attend(kernels, qkv, on_gpu, attention_batch([330], [330], tables), layout, Mode.PREFILL)
    for start, stop in ((0, 128), (128, 129), (129, 200), (200, 330)):
        batch = attention_batch([stop - start], [stop], tables)
        out = attend(kernels, qkv[start:stop], on_gpu, batch, layout, Mode.PREFILL)
        np.testing.assert_array_equal(out, whole[start:stop])


def device_step(
    kernels: CUDAKernels, batch: AttentionBatch, layout: KVLayout, table: Any, mode: Mode, num_tokens: int
) -> AttentionStep:
    positions, slots = slots_of(batch)
    device_batch = on_device(kernels, batch)
    plan = kernels.plan_attention(device_batch, layout, num_tokens, mode=mode)
    return AttentionStep(device_batch, kernels.to_device(positions), kernels.to_device(slots), table, plan)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("query_lens", [None, [1, 1, 3, 1, 20, 1, 1]])
@pytest.mark.parametrize("window", [None, 100])
@every_shape
def test_fused_attention_equals_its_parts(
    kernels: CUDAKernels,
    rng: np.random.Generator,
    num_heads: int,
    layout: KVLayout,
    window: int | None,
    query_lens: list[int] | None,
    mode: Mode,
) -> None:
    context_lens = [1, 2, 64, 65, 129, 256, 1025]
    query_lens = query_lens or [1] * len(context_lens)
    cache, tables = sequences(rng, context_lens, layout)
    batch = replace(attention_batch(query_lens, context_lens, tables), window=window)
    qkv = random_qkv(rng, sum(query_lens), num_heads, layout)
    half = layout.head_dim // 2
    table = kernels.rope_table([10000.0 ** (-i / half) for i in range(half)], 2048, 1.0)
    step = device_step(kernels, batch, layout, table, mode, len(qkv))
    fused_cache, fused_qkv = kernels.to_device(cache), kernels.to_device(qkv)
    channels = channels_of(kernels, layout)
    fused = kernels.to_host(kernels.attention(fused_qkv, fused_cache, step, layout, channels, mode=mode))
    if channels is not None:
        num_saturated = int(kernels.to_host(channels.num_saturated)[0])
    parts_cache, parts_qkv = kernels.to_device(cache), kernels.to_device(qkv)
    kernels.rope(parts_qkv, step.positions, table, layout)
    kernels.append_kv(parts_qkv, step.slots, parts_cache, layout, channels)
    out = kernels.paged_attention(parts_qkv, parts_cache, step.batch, layout, channels, mode=mode)
    if channels is not None:
        assert kernels.to_host(channels.num_saturated)[0] == 2 * num_saturated > 0
    np.testing.assert_array_equal(kernels.to_host(fused_cache), kernels.to_host(parts_cache))
    np.testing.assert_array_equal(fused, kernels.to_host(out))


@pytest.mark.parametrize("mode", Mode)
def test_replayed_step_follows_its_arrays(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    """Lengths and tables change in place; the plan is made anew on the device, counters are left clean."""
    layout = KVLayout(2, 64)
    context_lens = [900, 64, 513, 30]
    cache, tables = sequences(rng, context_lens, layout)
    table = kernels.rope_table([1.0 / (i + 1) for i in range(32)], 1024, 1.0)
    qkv = kernels.to_device(random_qkv(rng, 4, 6, layout))
    on_gpu = kernels.to_device(cache)
    batch = attention_batch([1] * 4, context_lens, tables)
    positions, slots = (kernels.to_device(a) for a in slots_of(batch))
    arrays = on_device(kernels, batch)
    result = kernels.zeros((4, 6 * 64), np.float16)

    graph_step = _one_step(kernels, qkv, on_gpu, arrays, positions, slots, table, layout, mode, result)
    replay = kernels.capture(graph_step)
    for order in ([0, 1, 2, 3], [2, 3, 1, 0], [1, 0, 3, 2]):
        now = attention_batch([1] * 4, [context_lens[i] for i in order], tables[order])
        new_positions, new_slots = slots_of(now)
        arrays.context_lens.set(now.context_lens)
        arrays.block_tables.set(now.block_tables)
        positions.set(new_positions)
        slots.set(new_slots)
        tokens = random_qkv(rng, 4, 6, layout)
        qkv.set(tokens)
        kernels.device.stream.synchronize()
        replay()
        out = np.array(kernels.to_host(result))
        fresh = device_step(kernels, now, layout, table, mode, 4)
        expected = kernels.attention(kernels.to_device(tokens), on_gpu, fresh, layout, mode=mode)
        np.testing.assert_array_equal(out, kernels.to_host(expected))
        if mode is Mode.DECODE:
            assert (kernels.to_host(fresh.plan)[0, 4 : 4 + 256 * 2 * 2] == 0).all()


def _one_step(
    kernels: CUDAKernels,
    qkv: Any,
    cache: Any,
    arrays: AttentionBatch,
    positions: Any,
    slots: Any,
    table: Any,
    layout: KVLayout,
    mode: Mode,
    result: Any,
) -> Callable[[], None]:
    def step() -> None:
        plan = kernels.plan_attention(arrays, layout, len(qkv), mode=mode)
        out = kernels.attention(qkv, cache, AttentionStep(arrays, positions, slots, table, plan), layout, mode=mode)
        result[...] = out

    return step


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("dtype", KVDtype)
def test_large_scores_do_not_overflow(
    kernels: CUDAKernels, rng: np.random.Generator, mode: Mode, dtype: KVDtype
) -> None:
    layout = KVLayout(1, 64, dtype)
    cache, tables = sequences(rng, [100], layout)
    qkv = (rng.standard_normal((40, 3 * 64)) * 1e4).astype(np.float16)
    out = attend(kernels, qkv, cache, attention_batch([40], [100], tables), layout, mode)
    values = reference.read_kv(cache[tables[0, :2]], layout)[:, 0, 1].reshape(-1, 64)[:100]
    assert np.isfinite(out).all()
    assert (out <= values.max(axis=0) + 0.02).all()
    assert (out >= values.min(axis=0) - 0.02).all()


@pytest.mark.parametrize("mode", Mode)
def test_tiny_values_keep_their_precision(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences(rng, [500], layout)
    parameters = cache[..., 2 * 64 * 64 :].view(np.float16).reshape(-1, 2, 64, 2)
    parameters[:, 1] *= np.float16(2e-3)  # values of about 2e-3, their scales of 2e-5 denormal in fp16
    qkv = random_qkv(rng, 1, 2, layout)
    batch = attention_batch([1], [500], tables)
    out = attend(kernels, qkv, cache, batch, layout, mode)
    error = np.abs(out - expected_of(qkv, cache, batch, layout))
    assert error.max() <= tolerance(mode, layout) * 2e-3 + 2.0**-25


@pytest.mark.parametrize("mode", Mode)
def test_nan_query_gives_nan_in_its_row_only(kernels: CUDAKernels, rng: np.random.Generator, mode: Mode) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences(rng, [40], layout)
    qkv = random_qkv(rng, 40, 2, layout)
    qkv[11, 70] = np.nan
    out = attend(kernels, qkv, cache, attention_batch([40], [40], tables), layout, mode)
    assert np.isnan(out[11, 64:]).all()
    assert np.isfinite(np.delete(out, 11, axis=0)).all()
    assert np.isfinite(out[11, :64]).all()


def test_row_without_context_gives_zeros(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences(rng, [40, 70], layout)
    qkv = random_qkv(rng, 2, 2, layout)
    out = attend(kernels, qkv, cache, attention_batch([1, 1], [0, 70], tables), layout, Mode.DECODE)
    assert (out[0] == 0).all()
    assert np.isfinite(out[1]).all()
