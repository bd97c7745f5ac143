"""Which KV blocks belong to which sequence. Host-side bookkeeping only: the blocks' bytes live on the device."""

from __future__ import annotations

from collections import deque

from nibble.kernels.layout import BLOCK_SIZE


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockManager:
    """A pool of num_blocks blocks of BLOCK_SIZE tokens, handed out one by one."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._is_used = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pool in use, 0..1."""
        return 1.0 - len(self._free) / self.num_blocks

    def num_missing(self, block_table: list[int], num_tokens: int) -> int:
        """How many blocks must be added to block_table before it holds num_tokens tokens."""
        return max(0, num_blocks_for(num_tokens) - len(block_table))

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        if num_tokens <= len(block_table) * BLOCK_SIZE:  # 63 of 64 times, for every sequence in every step
            return True
        return self.num_missing(block_table, num_tokens) <= len(self._free)

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append free blocks until block_table holds num_tokens tokens. Call `can_grow` first."""
        for _ in range(self.num_missing(block_table, num_tokens)):
            block_id = self._free.popleft()
            self._is_used[block_id] = 1
            block_table.append(block_id)

    def release(self, block_table: list[int]) -> None:
        """Give all blocks of block_table back and empty it."""
        for block_id in block_table:
            assert self._is_used[block_id], f"block {block_id} was freed twice"
            self._is_used[block_id] = 0
        self._free.extend(block_table)
        block_table.clear()

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Assert that every block is either free or in exactly one of block_tables (all that are alive)."""
        used = [block_id for table in block_tables for block_id in table]
        assert sorted([*used, *self._free]) == list(range(self.num_blocks)), "a block is lost or owned twice"
        assert all(self._is_used[block_id] for block_id in used), "a block in use is marked free"
