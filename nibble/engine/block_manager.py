"""Which KV blocks belong to which sequences. Host-side bookkeeping only: the blocks' bytes live on the device.

A full block never changes again, so sequences whose tables begin with the same content may share it: `share` makes it
known by a name (`block_hashes.py`), `match` finds it. Nobody writes to a block that others read, because only full ones
are shared; so nothing is ever copied on a write. A named block that no sequence refers to any more keeps its content
until its room is needed: the longest unused one goes first, and of one table the last block before those it builds on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import chain

from nibble.kernels.layout import BLOCK_SIZE


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class BlockManager:
    """A pool of num_blocks blocks of BLOCK_SIZE tokens. A block is in use (some tables have it), cached or empty."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._num_users = [0] * num_blocks
        self._empty = deque(range(num_blocks))  # without users and without a name
        self._cached: OrderedDict[int, None] = OrderedDict()  # without users, with a name; the longest unused first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}  # the inverse

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out: empty ones and those that are only cached."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses and that can still be found."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Share of the pool in use, 0..1."""
        return 1.0 - self.num_free / self.num_blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks with these names, up to the first that there is none for."""
        found = []
        for block_hash in hashes:
            block_id = self._blocks.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def can_start(self, matched: Sequence[int], num_tokens: int) -> bool:
        """Whether a table of num_tokens tokens can begin with these blocks."""
        num_missing = num_blocks_for(num_tokens) - len(matched)
        return num_missing <= self.num_free - sum(not self._num_users[block_id] for block_id in matched)

    def start(self, block_table: list[int], matched: Sequence[int], num_tokens: int) -> None:
        """Fill an empty table: first these blocks, then new ones. Call `can_start` first."""
        assert not block_table, "the table is in use"
        for block_id in matched:
            self._use(block_id)
        block_table.extend(matched)
        self.grow(block_table, num_tokens)

    def can_grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Whether enough blocks are free for block_table to hold num_tokens tokens."""
        return num_blocks_for(num_tokens) - len(block_table) <= self.num_free

    def grow(self, block_table: list[int], num_tokens: int) -> None:
        """Append new blocks until block_table holds num_tokens tokens. Call `can_grow` first."""
        for _ in range(num_blocks_for(num_tokens) - len(block_table)):
            if not self._empty:
                self._forget(next(iter(self._cached)))
            block_id = self._empty.popleft()
            self._num_users[block_id] = 1
            block_table.append(block_id)

    def num_in_common(self, block_table: list[int]) -> int:
        """How many of its first blocks other tables have too."""
        return next((i for i, block_id in enumerate(block_table) if self._num_users[block_id] == 1), len(block_table))

    def num_used_by(self, kept: Iterable[int], block_tables: Iterable[list[int]]) -> int:
        """How many blocks nobody uses but these tables, those to be kept left out."""
        counts = Counter(chain.from_iterable(block_tables))
        for block_id in kept:
            del counts[block_id]
        return sum(self._num_users[block_id] == count for block_id, count in counts.items())

    def share(self, block_table: list[int], index: int, block_hash: bytes) -> None:
        """Let others find the full block at this index. If there is one of that name already, the table gets that one
        instead: the content is the same."""
        block_id, known = block_table[index], self._blocks.get(block_hash)
        if known is None:
            assert self._hashes[block_id] is None, f"block {block_id} has another name already"
            self._hashes[block_id], self._blocks[block_hash] = block_hash, block_id
        elif known != block_id:
            self._use(known)
            block_table[index] = known
            self._leave(block_id)

    def release(self, block_table: list[int]) -> None:
        """Give all blocks of block_table back and empty it. Those with a name can be found until they are needed."""
        for block_id in reversed(block_table):
            self._leave(block_id)
        block_table.clear()

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Let nobody find the blocks of these names any more. Whoever uses one keeps it."""
        for block_hash in hashes:
            if block_hash in self._blocks:
                self._forget(self._blocks[block_hash])

    def _forget(self, block_id: int) -> None:
        """Take a block's name away."""
        block_hash = self._hashes[block_id]
        assert block_hash is not None, f"block {block_id} has no name"
        del self._blocks[block_hash]
        self._hashes[block_id] = None
        if not self._num_users[block_id]:
            del self._cached[block_id]
            self._empty.append(block_id)

    def check_integrity(self, block_tables: list[list[int]]) -> None:
        """Assert that nothing is lost or counted twice, where block_tables are all that are alive."""
        num_users = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), f"a table has a block twice: {table}"
            for block_id in table:
                num_users[block_id] += 1
        assert num_users == self._num_users, "users are miscounted"
        used = [block_id for block_id, count in enumerate(num_users) if count]
        everyone = sorted([*used, *self._cached, *self._empty])
        assert everyone == list(range(self.num_blocks)), "a block is lost, or both free and in use"
        names = {block_hash: block_id for block_id, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert names == self._blocks, "names and blocks do not agree"
        assert all(self._hashes[block_id] is not None for block_id in self._cached), "a cached block has no name"
        assert all(self._hashes[block_id] is None for block_id in self._empty), "an empty block has a name"

    def _use(self, block_id: int) -> None:
        if not self._num_users[block_id]:
            del self._cached[block_id]
        self._num_users[block_id] += 1

    def _leave(self, block_id: int) -> None:
        assert self._num_users[block_id], f"block {block_id} was freed twice"
        self._num_users[block_id] -= 1
        if self._num_users[block_id]:
            return
        if self._hashes[block_id] is None:
            self._empty.append(block_id)
        else:
            self._cached[block_id] = None
