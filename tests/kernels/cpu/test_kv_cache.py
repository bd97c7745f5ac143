"""append_kv writes the bytes layout.py states; paged_attention reads them, whatever blocks they are in."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from kv_channels import channels_of

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import AttentionBatch, KVChannels, Mode
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout


def poisoned_cache(num_blocks: int, layout: KVLayout) -> np.ndarray:
    """0xFF everywhere: every fp16 that nobody wrote is a NaN, and shows."""
    return np.full((num_blocks, layout.num_kv_heads, layout.head_block_bytes), 0xFF, np.uint8)


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_append_writes_the_specified_bytes(
    kernels: CPUKernels, rng: np.random.Generator, dtype: KVDtype, num_kv_heads: int, head_dim: int
) -> None:
    layout = KVLayout(num_kv_heads, head_dim, dtype)
    qkv = rng.standard_normal((70, (2 + 2 * num_kv_heads) * head_dim)).astype(np.float32)
    start = 2 * head_dim
    qkv[0, start : start + head_dim] = 3.25  # constant: scale 0
    qkv[1, start : start + head_dim] = 0
    qkv[2, start : start + head_dim] *= 1e4
    qkv[3, start : start + head_dim] *= 1e6  # beyond fp16: saturates
    qkv[4, start : start + head_dim] *= 1e38
    qkv[5, start : start + head_dim] *= 1e-7  # a scale that is a denormal or 0 in fp16
    qkv[6, start : start + head_dim] += 1000  # large zero, small scale
    slots = rng.permutation(4 * BLOCK_SIZE)[:70].astype(np.int64)
    slots[[7, 69]] = -1, -200  # skipped
    written, expected = poisoned_cache(4, layout), poisoned_cache(4, layout)
    channels = channels_of(kernels, layout)
    kernels.append_kv(qkv, slots, written, layout, channels)
    with np.errstate(over="ignore"):
        num_saturated = reference.append_kv(qkv, slots, expected, layout)
    np.testing.assert_array_equal(written, expected)
    if channels is not None:
        assert channels.num_saturated[0] == num_saturated > 4 * head_dim
        kernels.append_kv(qkv, slots, written, layout, channels)
        assert channels.num_saturated[0] == 2 * num_saturated


@pytest.mark.parametrize(("steps", "q", "saturates"), [
    (127.5, 127, 0), (128.4, 127, 0), (128.6, 127, 1), (-128.4, -128, 0), (-128.6, -128, 1),
    (np.inf, 127, 1), (-np.inf, -128, 1), (np.nan, -128, 1),
])  # fmt: skip
def test_what_a_channel_does_not_hold_saturates_and_is_counted(
    kernels: CPUKernels, steps: float, q: int, saturates: int
) -> None:
    layout = KVLayout(1, 64, KVDtype.INT8_CHANNEL)
    parameters = np.empty(layout.channels_shape, np.float32)
    parameters[:, :, 0], parameters[:, :, 1] = 0.25, 3.0
    channels = KVChannels(parameters, np.zeros(1, np.int64))
    qkv = np.full((1, 3 * 64), 3.0, np.float32)
    qkv[0, 64 + 9] = 3 + 0.25 * steps
    cache = poisoned_cache(1, layout)
    kernels.append_kv(qkv, np.zeros(1, np.int64), cache, layout, channels)
    expected = np.zeros(64, np.int8)
    expected[9] = q
    np.testing.assert_array_equal(cache[0, 0, :64].view(np.int8), expected)
    assert channels.num_saturated[0] == saturates


def sequences_in_cache(
    kernels: CPUKernels, rng: np.random.Generator, context_lens: list[int], num_heads: int, layout: KVLayout
) -> tuple[np.ndarray, np.ndarray]:
    """A cache that holds random sequences in permuted blocks: (kv_cache, block_tables)."""
    blocks_of = [-(-length // BLOCK_SIZE) for length in context_lens]
    blocks = rng.permutation(sum(blocks_of) + 3).astype(np.int32)
    cache = poisoned_cache(len(blocks), layout)
    channels = channels_of(kernels, layout)
    tables = np.full((len(context_lens), max(blocks_of)), 10**6, np.int32)  # past the end: undefined
    used = 0
    for s, (length, count) in enumerate(zip(context_lens, blocks_of, strict=True)):
        tables[s, :count] = blocks[used : used + count]
        used += count
        positions = np.arange(length)
        slots = tables[s, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        columns = (num_heads + 2 * layout.num_kv_heads) * layout.head_dim
        kernels.append_kv(rng.standard_normal((length, columns)).astype(np.float32), slots, cache, layout, channels)
    return cache, tables


def attention_batch(
    query_lens: list[int], context_lens: list[int], tables: np.ndarray, window: int | None = None
) -> AttentionBatch:
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    return AttentionBatch(starts, np.array(context_lens, np.int32), tables, window)


def tolerance(mode: Mode, head_dim: int, context_len: int) -> float:
    """Absolute, for q, k, v of magnitude about 1 (|v| < 6).

    fp32: a score's D additions shift its weight by that much relatively, the sum over the context rounds once per 16
    tokens. PREFILL may round q and the weights to bf16 (2^-9): a score moves by about 2^-9 |q k| / sqrt(D), the output
    by as much again from the weights.
    """
    fp32 = 2.0**-23 * 6 * (head_dim + context_len / 16 + 16)
    return fp32 if mode is Mode.DECODE else fp32 + 2.0**-9 * 8


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 96), (16, 1, 64), (2, 1, 128), (3, 1, 256)],
)
def test_attention_over_a_ragged_batch(
    kernels: CPUKernels,
    rng: np.random.Generator,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: KVDtype,
    mode: Mode,
) -> None:
    layout = KVLayout(num_kv_heads, head_dim, dtype)
    query_lens, context_lens = [1, 17, 1, 40, 5, 1], [1, 17, 64, 70, 200, 300]
    cache, tables = sequences_in_cache(kernels, rng, context_lens, num_heads, layout)
    batch = attention_batch(query_lens, context_lens, tables)
    qkv = rng.standard_normal((sum(query_lens), (num_heads + 2 * num_kv_heads) * head_dim)).astype(np.float32)
    out = kernels.paged_attention(qkv, cache, batch, layout, channels_of(kernels, layout), mode=mode)
    assert out.shape == (sum(query_lens), num_heads * head_dim)
    with np.errstate(invalid="ignore"):  # the poison
        expected = reference.paged_attention(qkv, cache, batch, layout)
    assert np.abs(out - expected).max() <= tolerance(mode, head_dim, max(context_lens))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize("window", [1, 37, 64, 300, 1000])
def test_a_window_hides_what_is_older(
    kernels: CPUKernels, rng: np.random.Generator, dtype: KVDtype, window: int, mode: Mode
) -> None:
    """Blocks that nobody sees are poisoned: they must not be read."""
    layout = KVLayout(2, 64, dtype)
    query_lens, context_lens = [1, 17, 1, 150, 5, 1, 90], [1, 17, 64, 150, 257, 700, 400]
    cache, tables = sequences_in_cache(kernels, rng, context_lens, 6, layout)
    for s, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        oldest = max(0, context_len - query_len + 1 - window)
        cache[tables[s, : oldest // BLOCK_SIZE]] = 0xFF
    batch = attention_batch(query_lens, context_lens, tables, window)
    qkv = rng.standard_normal((sum(query_lens), 10 * 64)).astype(np.float32)
    out = kernels.paged_attention(qkv, cache, batch, layout, channels_of(kernels, layout), mode=mode)
    with np.errstate(invalid="ignore"):
        expected = reference.paged_attention(qkv, cache, batch, layout)
    assert np.abs(out - expected).max() <= tolerance(mode, 64, max(context_lens))


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("window", [40, 100])
def test_with_a_window_too_a_row_does_not_depend_on_the_others(
    kernels: CPUKernels, rng: np.random.Generator, window: int, mode: Mode
) -> None:
    layout = KVLayout(3, 64)
    cache, tables = sequences_in_cache(kernels, rng, [330], 9, layout)
    qkv = rng.standard_normal((330, 15 * 64)).astype(np.float32)
    whole = kernels.paged_attention(
        qkv, cache, attention_batch([330], [330], tables, window), layout, channels_of(kernels, layout), mode=mode
    )
    for start, stop in ((0, 128), (128, 129), (129, 200), (200, 330)):
        batch = attention_batch([stop - start], [stop], tables, window)
        out = kernels.paged_attention(qkv[start:stop], cache, batch, layout, channels_of(kernels, layout), mode=mode)
        np.testing.assert_array_equal(out, whole[start:stop])


@pytest.mark.parametrize("dtype", KVDtype)
def test_decode_row_does_not_depend_on_the_batch(kernels: CPUKernels, rng: np.random.Generator, dtype: KVDtype) -> None:
    layout = KVLayout(3, 64, dtype)
    context_lens = [700, 256, 257, 30]
    cache, tables = sequences_in_cache(kernels, rng, context_lens, 9, layout)
    qkv = rng.standard_normal((4 * 20, 15 * 64)).astype(np.float32)
    batch = attention_batch([20] * 4, context_lens, tables)
    together = kernels.paged_attention(qkv, cache, batch, layout, channels_of(kernels, layout), mode=Mode.DECODE)
    for s, context_len in enumerate(context_lens):
        for i in (0, 7, 19):
            row = 20 * s + i
            alone = attention_batch([1], [context_len - 19 + i], tables[s : s + 1])
            out = kernels.paged_attention(
                qkv[row : row + 1], cache, alone, layout, channels_of(kernels, layout), mode=Mode.DECODE
            )
            np.testing.assert_array_equal(out[0], together[row])


@pytest.mark.parametrize("dtype", KVDtype)
def test_prefill_row_does_not_depend_on_the_chunk(
    kernels: CPUKernels, rng: np.random.Generator, dtype: KVDtype
) -> None:
    layout = KVLayout(3, 64, dtype)
    cache, tables = sequences_in_cache(kernels, rng, [330], 9, layout)
    qkv = rng.standard_normal((330, 15 * 64)).astype(np.float32)
    whole = kernels.paged_attention(
        qkv, cache, attention_batch([330], [330], tables), layout, channels_of(kernels, layout), mode=Mode.PREFILL
    )
    for start, stop in ((0, 128), (128, 129), (129, 200), (200, 330)):
        batch = attention_batch([stop - start], [stop], tables)
        out = kernels.paged_attention(
            qkv[start:stop], cache, batch, layout, channels_of(kernels, layout), mode=Mode.PREFILL
        )
        np.testing.assert_array_equal(out, whole[start:stop])


@pytest.mark.parametrize("mode", Mode)
def test_large_scores_do_not_overflow(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences_in_cache(kernels, rng, [100], 1, layout)
    qkv = (rng.standard_normal((40, 3 * 64)) * 1e4).astype(np.float32)
    out = kernels.paged_attention(
        qkv, cache, attention_batch([40], [100], tables), layout, channels_of(kernels, layout), mode=mode
    )
    values = reference.read_kv(cache[tables[0]], layout)[:, 0, 1].reshape(-1, 64)[:100]
    assert np.isfinite(out).all()
    assert (out <= values.max(axis=0) + 0.02).all()
    assert (out >= values.min(axis=0) - 0.02).all()


@pytest.mark.parametrize("mode", Mode)
def test_nan_query_gives_nan_in_its_row_only(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    layout = KVLayout(1, 64)
    cache, tables = sequences_in_cache(kernels, rng, [40], 2, layout)
    qkv = rng.standard_normal((40, 4 * 64)).astype(np.float32)
    qkv[11, 70] = np.nan
    out = kernels.paged_attention(
        qkv, cache, attention_batch([40], [40], tables), layout, channels_of(kernels, layout), mode=mode
    )
    assert np.isnan(out[11, 64:]).all()
    assert np.isfinite(np.delete(out, 11, axis=0)).all()


def test_blocks_go_to_another_array_and_come_back(kernels: CPUKernels, rng: np.random.Generator) -> None:
    cache = rng.integers(0, 256, (2, 5, 1, 32), dtype=np.uint8)
    swapped = np.zeros((3, 2, 1, 32), np.uint8)
    kernels.copy_blocks(cache, swapped, np.array([[4, 0], [1, 2]], np.int32), to_host=True)
    np.testing.assert_array_equal(swapped, np.stack([cache[:, 4], np.zeros_like(cache[:, 0]), cache[:, 1]]))
    expected = cache.copy()
    expected[:, 3] = cache[:, 1]
    kernels.copy_blocks(cache, swapped, np.array([[3, 2]], np.int32), to_host=False)
    np.testing.assert_array_equal(cache, expected)
