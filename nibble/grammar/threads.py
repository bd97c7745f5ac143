"""Threads for code that descends deeply."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

# Four times what grammars within the limits were seen to need. Memory is taken as far as it is used.
STACK_BYTES = 128 << 20
_lock = threading.Lock()


def deep_stack_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads, started here, have STACK_BYTES of stack each."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    started = threading.Barrier(num_threads + 1)
    with _lock:
        usual = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(num_threads):
                pool.submit(started.wait)  # none is idle before all are there, so each starts one
        finally:
            threading.stack_size(usual)
    started.wait()
    return pool
