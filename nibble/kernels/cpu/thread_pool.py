"""Threads that run one compiled function on the chunks of a job, made for many jobs of some 10 us each.

A job is a function pointer, a pointer to its arguments and a number of chunks. The caller publishes it, and it and the
worker threads claim chunks until none is left; which thread computes a chunk never changes its result. Chunks are
claimed, not dealt: a worker that the system is not running at the moment (the gateway and the broker share the
machine) delays nothing, where an OpenMP barrier would wait a scheduler tick for it. An idle worker spins for about
0.1 ms, the distance between two jobs of a decode step, then sleeps.

All state is one block of memory. The ticket is one 64-bit word that says job, number of chunks and next chunk, so that
a claim is one atomic addition, and a claim in range keeps the job's other words valid until its chunk is done.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

from nibble.kernels.cpu import atomics
from nibble.kernels.cpu.jit import inline_jit, kernel_jit

CACHE_LINE = 64
TICKET, DONE, FUNCTION, ARGUMENTS, SLEEPING, STOP, NUM_THREADS = (i * CACHE_LINE for i in range(7))  # byte offsets
MUTEX = 7 * CACHE_LINE
CONDITION = MUTEX + atomics.POSIX_OBJECT_BYTES
STATE_BYTES = CONDITION + atomics.POSIX_OBJECT_BYTES

# ticket = job << 40 | number of chunks << 20 | next chunk
CHUNK_BITS = 20
MAX_CHUNKS = (1 << CHUNK_BITS) - 1024  # room for each thread's one claim beyond the last chunk
CHUNK_MASK = (1 << CHUNK_BITS) - 1
JOB = 1 << 2 * CHUNK_BITS
JOB_MASK = (1 << 23) - 1

IDLE_SPINS = 2000  # x 60 ns: longer than the serial ops between two jobs
WAIT_SPINS = 500  # a chunk takes about 5 us; beyond that, let the thread that holds it run


@inline_jit
def _work(state):
    """Claim and run chunks of the current job until none is left. True if there was one."""
    worked = False
    while True:
        ticket = atomics.atomic_load(state + TICKET)
        if ticket & CHUNK_MASK >= (ticket >> CHUNK_BITS) & CHUNK_MASK:
            return worked
        ticket = atomics.atomic_add(state + TICKET, 1)
        chunk = ticket & CHUNK_MASK
        if chunk >= (ticket >> CHUNK_BITS) & CHUNK_MASK:
            return worked
        function = atomics.atomic_load(state + FUNCTION)
        atomics.call_pointer(function, atomics.atomic_load(state + ARGUMENTS), chunk)
        atomics.atomic_add(state + DONE, 1)
        worked = True


@inline_jit
def run_job(state, function, arguments, num_chunks):
    """Run function(arguments, chunk) for each chunk; returns when all are done. One caller at a time."""
    if num_chunks <= 1:  # not worth waking anybody
        if num_chunks == 1:
            atomics.call_pointer(function, arguments, 0)
        return
    atomics.atomic_exchange(state + FUNCTION, function)
    atomics.atomic_exchange(state + ARGUMENTS, arguments)
    atomics.atomic_exchange(state + DONE, 0)
    job = (atomics.atomic_load(state + TICKET) // JOB + 1) & JOB_MASK
    atomics.atomic_exchange(state + TICKET, job * JOB + (num_chunks << CHUNK_BITS))
    if atomics.atomic_load(state + SLEEPING) > 0:
        _wake(state)
    _work(state)
    spins = 0
    while atomics.atomic_load(state + DONE) < num_chunks:
        spins += 1
        if spins < WAIT_SPINS:
            atomics.spin_hint()
        else:
            atomics.sched_yield()


@inline_jit
def _wake(state):
    atomics.mutex_lock(state + MUTEX)
    atomics.cond_broadcast(state + CONDITION)
    atomics.mutex_unlock(state + MUTEX)


@inline_jit
def _has_work(state):
    ticket = atomics.atomic_load(state + TICKET)
    return ticket & CHUNK_MASK < (ticket >> CHUNK_BITS) & CHUNK_MASK


@kernel_jit
def _worker(state):
    """A worker thread's life."""
    spins = 0
    while atomics.atomic_load(state + STOP) == 0:
        if _work(state):
            spins = 0
        elif spins < IDLE_SPINS:
            spins += 1
            atomics.spin_hint()
        else:
            spins = 0
            atomics.mutex_lock(state + MUTEX)
            atomics.atomic_add(state + SLEEPING, 1)
            # The ticket is read after SLEEPING is raised, and raised before SLEEPING is read: no wake-up is missed.
            while atomics.atomic_load(state + STOP) == 0 and not _has_work(state):
                atomics.cond_wait(state + CONDITION, state + MUTEX)
            atomics.atomic_add(state + SLEEPING, -1)
            atomics.mutex_unlock(state + MUTEX)


@inline_jit
def num_threads_of(state):
    """How many threads share a job, the caller included."""
    return atomics.atomic_load(state + NUM_THREADS)


@kernel_jit
def _initialize(state, num_threads):
    atomics.atomic_exchange(state + NUM_THREADS, num_threads)
    atomics.mutex_init(state + MUTEX, 0)
    atomics.cond_init(state + CONDITION, 0)


@kernel_jit
def _stop(state):
    atomics.atomic_exchange(state + STOP, 1)
    _wake(state)


class ThreadPool:
    """num_threads - 1 worker threads beside the caller, stopped by `close`, garbage collection or interpreter exit."""

    def __init__(self, num_threads: int) -> None:
        memory = np.zeros(STATE_BYTES + CACHE_LINE, np.uint8)
        self.num_threads = num_threads
        self.state: int = -(-memory.ctypes.data // CACHE_LINE) * CACHE_LINE  # what run_job takes
        _initialize(self.state, num_threads)
        threads = [
            threading.Thread(target=_worker, args=(self.state,), name=f"nibble-cpu-{i}", daemon=True)
            for i in range(1, num_threads)
        ]
        for thread in threads:
            thread.start()
        # Holds the memory until the threads have left it.
        self._finalizer = weakref.finalize(self, _close, self.state, threads, memory)

    def close(self) -> None:
        """Stop the threads and wait for them. No job may be running."""
        self._finalizer()


def _close(state: int, threads: list[threading.Thread], memory: npt.NDArray[np.uint8]) -> None:
    _stop(state)
    for thread in threads:
        thread.join()
    del memory
