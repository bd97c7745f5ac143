"""The host's memory that preempted sequences' blocks go to, and the moves of blocks to it and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import attrgetter

import numpy as np

from nibble.engine.adjustments import NUM_HOST_BUFFERS
from nibble.engine.swap_space import BlockMove
from nibble.kernels.interface import Array, Kernels


class SwapBuffers:
    """Memory for num_blocks blocks of kv_cache, which is uint8 (num_layers, blocks, ...).

    Page-locking takes the machine 0.4 s for each GiB: a thread does it while the engine starts.
    """

    def __init__(self, kernels: Kernels, kv_cache: Array, num_blocks: int) -> None:
        self._kernels = kernels
        self._kv_cache = kv_cache
        num_layers, num_device_blocks, *block_shape = kv_cache.shape
        host_buffer = kernels.host_buffer if num_blocks else np.zeros  # a backend need not have empty ones
        # In one step, each block leaves once at most, and each swapped one comes back once.
        self._moves = host_buffer((NUM_HOST_BUFFERS, num_device_blocks + num_blocks, 2), np.int32)
        executor = ThreadPoolExecutor(1, "page-locking")
        self._blocks = executor.submit(host_buffer, (num_blocks, num_layers, *block_shape), np.uint8)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Until the memory is there. Raises MemoryError."""
        self._blocks.result()

    def move(self, moves: list[BlockMove], turn: int) -> None:
        """Behind the steps launched before, which still use the blocks that leave. turn: whose `launch` it is."""
        start, pairs = 0, self._moves[turn]
        for to_host, run in groupby(moves, key=attrgetter("to_host")):
            ids = [(move.block_id, move.host_block) for move in run]
            stop = start + len(ids)
            pairs[start:stop] = ids
            self._kernels.copy_blocks(self._kv_cache, self._blocks.result(), pairs[start:stop], to_host=to_host)
            start = stop
