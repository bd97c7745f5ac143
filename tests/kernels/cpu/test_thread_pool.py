"""The pool runs every chunk once, sleeps and wakes, and stops."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numba import carray

from nibble.kernels.cpu import atomics, memory
from nibble.kernels.cpu.jit import ChunkFunction, kernel_jit
from nibble.kernels.cpu.thread_pool import ThreadPool, run_job


@ChunkFunction
def count_chunk(arguments, chunk):
    atomics.atomic_add(arguments + 8 * chunk, 1)


@kernel_jit
def run_counts(pool, function, counts, num_chunks):
    run_job(pool, function, counts.ctypes.data, num_chunks)
    # read after the job: all chunks' writes must be visible
    return carray(memory.address_as_void_pointer(counts.ctypes.data), num_chunks, np.int64).sum()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_every_chunk_runs_once_per_job(num_threads: int) -> None:
    pool = ThreadPool(num_threads)
    for num_chunks in (0, 1, 2, 3, 100, 5000):
        counts = np.zeros(num_chunks + 1, np.int64)
        for job in range(1, 51):
            assert run_counts(pool.state, count_chunk.address, counts, num_chunks) == job * num_chunks
        np.testing.assert_array_equal(counts[:num_chunks], 50)
        assert counts[num_chunks] == 0
    pool.close()


def test_sleeping_threads_wake_for_a_job() -> None:
    pool = ThreadPool(3)
    counts = np.zeros(64, np.int64)
    for _ in range(5):
        time.sleep(0.01)  # far longer than a thread spins
        run_counts(pool.state, count_chunk.address, counts, 64)
    np.testing.assert_array_equal(counts, 5)
    pool.close()


def test_close_stops_the_threads() -> None:
    before = threading.active_count()
    pool = ThreadPool(4)
    assert threading.active_count() == before + 3
    pool.close()
    assert threading.active_count() == before
    pool.close()


def test_an_unreferenced_pool_stops_its_threads() -> None:
    before = threading.active_count()
    pool = ThreadPool(2)
    del pool
    assert threading.active_count() == before
