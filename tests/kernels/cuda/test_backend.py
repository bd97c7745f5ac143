"""The backend itself: memory, copies, capture. Its ops have test files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nibble.kernels.interface import Int8Weight
from nibble.kernels.layout import KVDtype, KVLayout

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu


def test_names_its_device(kernels: CUDAKernels) -> None:
    assert kernels.device_name.startswith("cuda: ")
    assert kernels.is_asynchronous


def test_memory_info_follows_allocations(kernels: CUDAKernels) -> None:
    free_before, total = kernels.memory_info()
    array = kernels.zeros((64 << 20,), np.uint8)
    free_during, _ = kernels.memory_info()
    del array
    free_after, _ = kernels.memory_info()
    assert 0 < free_during <= free_before - (64 << 20) < free_before < total
    assert free_after >= free_during + (64 << 20)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.float16, np.float32, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (1 << 20,), (0, 7)])
def test_arrays_come_back_as_they_went(
    kernels: CUDAKernels, rng: np.random.Generator, dtype: type, shape: tuple[int, ...]
) -> None:
    array = rng.integers(0, 100, shape).astype(dtype)
    on_device = kernels.to_device(array)
    host = kernels.to_host(on_device)
    assert (on_device.shape, host.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(host, array)
    assert not kernels.to_host(kernels.zeros(shape, dtype)).any()


@pytest.mark.parametrize("num_bytes", [1 << 20, (8 << 20) - 1, 8 << 20, (200 << 20) + 12345])
def test_large_memory_map_arrives_whole(
    kernels: CUDAKernels, rng: np.random.Generator, tmp_path: Path, num_bytes: int
) -> None:
    content = rng.integers(0, 256, num_bytes + 3, dtype=np.uint8)
    (tmp_path / "weights").write_bytes(content.tobytes())
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")[3:]  # unaligned, read-only
    np.testing.assert_array_equal(kernels.to_host(kernels.to_device(mapped)), content[3:])


def test_source_may_change_after_to_device(kernels: CUDAKernels) -> None:
    for size in (100, 4 << 20):
        array = np.full(size, 7, np.int32)
        on_device = kernels.to_device(array)
        array[:] = 0
        assert (kernels.to_host(on_device) == 7).all()


def test_what_does_not_fit_is_a_memory_error(kernels: CUDAKernels) -> None:
    total = kernels.memory_info()[1]
    with pytest.raises(MemoryError):
        kernels.zeros((total + 1,), np.uint8)
    with pytest.raises(MemoryError, match="the workspace has"):
        kernels.gather_rows(kernels.zeros((1, 1 << 20), np.float32), kernels.zeros((1 << 20,), np.int32))


def test_host_buffer_copies_to_the_device(kernels: CUDAKernels) -> None:
    buffer = kernels.host_buffer((4, 8), np.int32)
    assert not buffer.any()
    target = kernels.zeros((2, 8), np.int32)
    buffer[:2] = np.arange(16).reshape(2, 8)
    kernels.copy_to_device(buffer[:2], target)
    copy = kernels.start_to_host(target)
    np.testing.assert_array_equal(copy.wait(), np.arange(16).reshape(2, 8))
    with pytest.raises(AssertionError, match="alike"):
        kernels.copy_to_device(buffer, target)


def test_copy_to_host_is_of_its_moment(kernels: CUDAKernels) -> None:
    array = kernels.to_device(np.zeros((50, 1000), np.int32))
    ids = kernels.to_device(np.arange(1000, dtype=np.int32))
    indices = kernels.to_device(np.arange(1000, dtype=np.int32))
    before = kernels.start_to_host(array)
    kernels.scatter_ids(ids, indices, array[7])
    after = kernels.start_to_host(array)
    kernels.scatter_ids(ids, indices, array[8])
    assert not before.wait().any()
    assert after.wait()[7].sum() == 999 * 500
    assert not after.wait()[8].any()
    assert after.wait() is not after.wait()


def test_host_copies_do_not_share_their_buffers(kernels: CUDAKernels) -> None:
    arrays = [kernels.to_device(np.full(300, i, np.int32)) for i in range(40)]
    copies = [kernels.start_to_host(array) for array in arrays]
    for array in arrays:
        kernels.start_to_host(array)  # dropped
    results = [copy.wait() for copy in copies]
    del copies
    later = [kernels.start_to_host(array) for array in reversed(arrays)]
    assert [copy.wait()[0] for copy in later] == list(reversed(range(40)))
    assert all((result == i).all() for i, result in enumerate(results))


def test_temporaries_of_a_scope_are_taken_back(kernels: CUDAKernels) -> None:
    rows = kernels.to_device(np.zeros(3, np.int32))
    x = kernels.zeros((1, 64), np.float32)

    def address() -> int:
        return int(kernels.gather_rows(x, rows).data.ptr)

    with kernels.temporaries():
        first = address()
        with kernels.temporaries():
            second = address()
        assert address() == second != first
    assert address() == first


def test_workspace_is_fitted_to_a_step(kernels: CUDAKernels) -> None:
    from nibble.kernels.cuda.backend import CUDAKernels

    other = CUDAKernels(workspace_bytes=4 << 20)
    x = other.zeros((1, 1 << 20), np.float32)
    rows = other.zeros((3,), np.int32)

    def step() -> None:
        with other.temporaries():
            other.gather_rows(x, rows)

    def larger_step() -> None:
        with other.temporaries():
            other.gather_rows(x, rows)
            other.gather_rows(x, rows[:1])

    with pytest.raises(MemoryError):
        step()
    assert other.fit_workspace(step) == 12 << 20
    other.capture(step)()
    with pytest.raises(MemoryError):
        larger_step()
    # Both use one stream: what one enqueued, the other finds done.
    np.testing.assert_array_equal(kernels.to_host(other.zeros((4,), np.int32)), np.zeros(4))


def test_capture_repeats_a_step_on_what_its_buffers_hold_then(kernels: CUDAKernels) -> None:
    x = kernels.to_device(np.arange(32, dtype=np.float32).reshape(4, 8))
    rows = kernels.to_device(np.array([1], np.int32))
    out = kernels.zeros((8,), np.int32)
    results: list[object] = []

    def step() -> None:
        results[:] = [kernels.gather_rows(x, rows)]
        ids = kernels.gather_ids(rows, out)
        kernels.scatter_ids(ids, rows, out)

    repeat = kernels.capture(step)
    buffer = kernels.host_buffer((1,), np.int32)
    for row in (3, 0, 2):
        buffer[0] = row
        kernels.copy_to_device(buffer, rows)
        repeat()
        np.testing.assert_array_equal(kernels.to_host(results[0])[0], np.arange(8 * row, 8 * row + 8))
    np.testing.assert_array_equal(kernels.to_host(out)[:4], [0, 1, 2, 3])


def test_backend_works_on_after_a_capture_that_failed(kernels: CUDAKernels) -> None:
    x = kernels.zeros((1, 8), np.float32)
    calls = []

    def step() -> None:
        calls.append(1)
        kernels.rms_norm(x, x[0], 1e-5)
        if len(calls) == 2:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kernels.capture(step)
    assert not kernels.to_host(kernels.rms_norm(x, x[0], 1e-5)).any()


def test_launchers_refuse_what_they_would_misread(kernels: CUDAKernels) -> None:
    x = kernels.zeros((4, 8), np.float32)
    with pytest.raises(AssertionError, match="contiguous"):
        kernels.rms_norm(x[:, :4], x[0, :4], 1e-5)
    with pytest.raises(AssertionError, match="float32"):
        kernels.rms_norm(kernels.zeros((4, 8), np.float16), x[0], 1e-5)
    with pytest.raises(AssertionError, match="int32"):
        kernels.embedding(kernels.zeros((4,), np.int64), Int8Weight(kernels.zeros((4, 16), np.int8), None, 16))
    with pytest.raises(AssertionError, match="wrap numbers"):
        kernels.device.kernel("rms_norm", "rms_norm").launch((1, 1, 1), 32, x, x, 1e-5, 8, x)


def test_read_bandwidth_is_that_of_a_gpu(kernels: CUDAKernels) -> None:
    assert 1e11 < kernels.read_bandwidth() < 2e13


def test_warm_up_loads_everything(kernels: CUDAKernels) -> None:
    from nibble.kernels.cuda.variants import all_variants

    kernels.warm_up()
    assert {(stem, defines) for stem, defines, _ in kernels.device.resources} == set(all_variants())


def test_warm_up_for_a_model_loads_what_it_uses(kernels: CUDAKernels) -> None:
    from nibble.kernels.cuda.backend import CUDAKernels
    from nibble.kernels.cuda.rope import KV_TYPES

    fresh = CUDAKernels(workspace_bytes=1 << 20, kernel_cache=kernels.device.kernel_cache)
    fresh.warm_up([KVLayout(2, 128, KVDtype.FP16)])
    loaded = {dict(defines).get("HEAD_DIM") for _, defines, _ in fresh.device.resources}
    kinds = {dict(defines).get("KV_TYPE") for stem, defines, _ in fresh.device.resources if stem == "attention_decode"}
    assert loaded == {None, 128}
    assert KV_TYPES[KVDtype.FP16] in kinds
    assert KV_TYPES[KVDtype.INT8_CHANNEL] not in kinds
    num_loaded = len(fresh.device.resources)
    fresh.warm_up([KVLayout(2, 128, KVDtype.FP16)])
    assert len(fresh.device.resources) == num_loaded
