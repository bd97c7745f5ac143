"""The methods of the backend that are no kernels of their own: memory, copies, capture, and the composed ops."""

from __future__ import annotations

import numpy as np
import pytest

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import AttentionBatch, AttentionStep, Int4Weight, Int8Weight, Mode
from nibble.kernels.layout import KVLayout
from nibble.kernels.pack import pack_int4


@pytest.fixture
def int8_weight(rng: np.random.Generator) -> Int8Weight:
    values = rng.integers(-128, 128, (64, 96)).astype(np.int8)
    return Int8Weight(values, (rng.random((64, 3)) * 0.01).astype(np.float16), 32)


@pytest.fixture
def int4_weight(rng: np.random.Generator) -> Int4Weight:
    scale = (rng.random((64, 3)) * 0.01).astype(np.float16)
    return Int4Weight(pack_int4(rng.integers(0, 16, (64, 96)).astype(np.uint8), scale, -7 * scale), 64, 96, 32)


def test_memory_info_is_of_this_machine(kernels: CPUKernels) -> None:
    free_bytes, total_bytes = kernels.memory_info()
    assert 1 << 20 < free_bytes < total_bytes


def test_arrays_are_the_host_s(kernels: CPUKernels) -> None:
    array = np.arange(3)
    assert kernels.to_device(array) is array
    assert kernels.to_host(array) is array
    assert not kernels.is_asynchronous
    buffer = kernels.host_buffer((2, 3), np.int32)
    assert not buffer.any()
    target = kernels.zeros((2, 3), np.int32)
    buffer[:] = 7
    kernels.copy_to_device(buffer, target)
    buffer[:] = 8
    assert (target == 7).all()


def test_copy_to_host_is_of_its_moment(kernels: CPUKernels) -> None:
    array = np.arange(3)
    copy = kernels.start_to_host(array)
    array[:] = 0
    np.testing.assert_array_equal(copy.wait(), [0, 1, 2])


def test_temporaries_outlive_a_scope_that_needs_none(kernels: CPUKernels) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with kernels.temporaries(), kernels.temporaries():
        out = kernels.gather_rows(x, np.array([1], np.int32))
    np.testing.assert_array_equal(out, x[1:])
    assert kernels.fit_workspace(lambda: None) == 0


def test_captured_step_reads_its_buffers_each_time(kernels: CPUKernels) -> None:
    ids = np.array([3], np.int32)
    latest = np.zeros(4, np.int32)

    def step() -> None:
        kernels.scatter_ids(kernels.gather_ids(ids, latest), np.array([1], np.int32), latest)

    repeat = kernels.capture(step)
    assert latest[1] == 3  # called once at least
    ids[0] = 2
    repeat()
    assert latest[1] == 2


@pytest.mark.parametrize("num_ids", [0, 1, 100])
def test_gather_ids_takes_negative_ones_from_the_latest(
    kernels: CPUKernels, rng: np.random.Generator, num_ids: int
) -> None:
    latest = rng.integers(-1, 100, 30).astype(np.int32)
    ids = rng.integers(-30, 30, num_ids).astype(np.int32)
    out = kernels.gather_ids(ids, latest)
    assert out.dtype == np.int32
    assert out.tolist() == [i if i >= 0 else max(int(latest[-1 - i]), 0) for i in ids.tolist()]


def test_scatter_ids_skips_negative_indices(kernels: CPUKernels) -> None:
    latest = np.full(5, 7, np.int32)
    kernels.scatter_ids(np.array([1, 2, -1], np.int32), np.array([4, -1, 0], np.int32), latest)
    np.testing.assert_array_equal(latest, [-1, 7, 7, 7, 1])


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_gated_linear_is_silu_and_mul_of_its_product(
    kernels: CPUKernels,
    rng: np.random.Generator,
    int4_weight: Int4Weight,
    int8_weight: Int8Weight,
    mode: Mode,
    num_tokens: int,
) -> None:
    x = rng.standard_normal((num_tokens, 96)).astype(np.float32)
    bias = rng.standard_normal(64).astype(np.float32)
    expected = kernels.silu_and_mul(kernels.int4_linear(x, int4_weight, bias, mode=mode))
    np.testing.assert_array_equal(kernels.int4_linear(x, int4_weight, bias, mode=mode, gated=True), expected)
    expected = kernels.silu_and_mul(kernels.int8_linear(x, int8_weight, bias, mode=mode))
    np.testing.assert_array_equal(kernels.int8_linear(x, int8_weight, bias, mode=mode, gated=True), expected)


def test_gated_linear_has_no_residual(kernels: CPUKernels, int4_weight: Int4Weight, int8_weight: Int8Weight) -> None:
    x, residual = np.zeros((1, 96), np.float32), np.zeros((1, 32), np.float32)
    with pytest.raises(AssertionError, match="no residual"):
        kernels.int4_linear(x, int4_weight, None, residual, mode=Mode.DECODE, gated=True)
    with pytest.raises(AssertionError, match="no residual"):
        kernels.int8_linear(x, int8_weight, None, residual, mode=Mode.DECODE, gated=True)


def test_logits_do_not_depend_on_the_batch(
    kernels: CPUKernels, rng: np.random.Generator, int8_weight: Int8Weight
) -> None:
    x = rng.standard_normal((9, 96)).astype(np.float32)
    together = kernels.logits(x, int8_weight)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(together, np.concatenate([kernels.logits(row[None], int8_weight) for row in x]))


@pytest.mark.parametrize("mode", Mode)
def test_attention_rotates_appends_and_attends(kernels: CPUKernels, rng: np.random.Generator, mode: Mode) -> None:
    layout = KVLayout(num_kv_heads=2, head_dim=64)
    table = kernels.rope_table([10000.0 ** (-i / 32) for i in range(32)], 128, 1.0)
    positions = np.arange(70, dtype=np.int32)
    blocks = np.array([[2, 0]], np.int32)
    slots = blocks[0, positions // 64] * 64 + positions.astype(np.int64) % 64
    batch = AttentionBatch(np.array([0, 70], np.int32), np.array([70], np.int32), blocks)
    qkv = rng.standard_normal((70, (4 + 2 * 2) * 64)).astype(np.float32)
    caches = [kernels.zeros((3, 2, layout.head_block_bytes), np.uint8) for _ in range(2)]
    step = AttentionStep(batch, positions, slots, table, kernels.plan_attention(batch, layout, 70, mode=mode))
    out = kernels.attention(qkv.copy(), caches[0], step, layout, mode=mode)
    kernels.rope(qkv, positions, table, layout)
    kernels.append_kv(qkv, slots, caches[1], layout)
    np.testing.assert_array_equal(out, kernels.paged_attention(qkv, caches[1], batch, layout, mode=mode))
    np.testing.assert_array_equal(caches[0], caches[1])
