"""BlockManager: every block is accounted for and every name leads to its content, after any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nibble.engine.block_manager import BlockManager, num_blocks_for
from nibble.kernels.layout import BLOCK_SIZE


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2)])
def test_blocks_hold_64_tokens(num_tokens: int, num_blocks: int) -> None:
    assert num_blocks_for(num_tokens) == num_blocks


def test_growing_keeps_the_blocks_that_are_there() -> None:
    manager, table = BlockManager(4), list[int]()
    manager.grow(table, 64)
    before = list(table)
    manager.grow(table, 65)
    assert table[:1] == before
    assert len(table) == 2
    assert manager.usage == 0.5


def test_a_full_pool_cannot_grow() -> None:
    manager, table = BlockManager(2), list[int]()
    manager.grow(table, 128)
    assert manager.can_grow(table, 128)
    assert not manager.can_grow(table, 129)


def test_freeing_a_block_twice_is_caught() -> None:
    manager, table = BlockManager(2), list[int]()
    manager.grow(table, 64)
    copy = list(table)
    manager.release(table)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.release(copy)


def test_a_shared_block_is_free_only_when_nobody_uses_it() -> None:
    manager, first, second = BlockManager(4), list[int](), list[int]()
    manager.grow(first, 128)
    manager.share(first, 0, b"a")
    manager.start(second, manager.match([b"a", b"b"]), 100)
    assert second[0] == first[0]
    assert manager.num_free == 1
    manager.release(first)
    assert manager.num_free == 2
    manager.release(second)
    assert manager.num_free == 4
    assert manager.match([b"a"])


def test_two_blocks_with_the_same_content_become_one() -> None:
    manager, first, second = BlockManager(4), list[int](), list[int]()
    for table in (first, second):
        manager.grow(table, 128)
        manager.share(table, 0, b"a")
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert manager.num_free == 1
    manager.check_integrity([first, second])


def test_the_longest_unused_block_goes_first_and_of_one_table_the_last() -> None:
    manager = BlockManager(5)
    for names in ([b"a1", b"a2"], [b"b1", b"b2"]):
        table: list[int] = []
        manager.grow(table, 128)
        for index, name in enumerate(names):
            manager.share(table, index, name)
        manager.release(table)
    manager.start(table, manager.match([b"a1"]), 64)  # now b is the one longest unused
    manager.release(table)
    for left in ([b"a1", b"a2", b"b1", b"b2"], [b"a1", b"b1", b"b2"], [b"a1", b"b1"], [b"a1"], []):
        manager.grow(table, 64 * len(table) + 64)
        assert [name for name in (b"a1", b"a2", b"b1", b"b2") if manager.match([name])] == left


def test_matched_blocks_are_not_counted_as_free_for_the_rest() -> None:
    manager, table = BlockManager(2), list[int]()
    manager.grow(table, 64)
    manager.share(table, 0, b"a")
    manager.release(table)
    assert manager.num_free == 2
    assert manager.can_start(manager.match([b"a"]), 128)
    assert not manager.can_start(manager.match([b"a"]), 129)


class BlockManagerMachine(RuleBasedStateMachine):
    """Tables of random content, where a block's name is all content up to its end, against a plain list of what must
    be found, in the order in which it goes."""

    NUM_TABLES = 5

    @initialize(num_blocks=st.integers(1, 12))
    def make(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks)
        self.tables: list[list[int]] = [[] for _ in range(self.NUM_TABLES)]
        self.contents = [b""] * self.NUM_TABLES  # a letter for each block that a table may hold
        self.num_shared = [0] * self.NUM_TABLES
        self.unused: list[bytes] = []  # names that nobody uses, the next to go first
        self.held: dict[int, bytes] = {}  # block -> the name that it was given last

    @rule(index=st.integers(0, NUM_TABLES - 1), content=st.text("ab", min_size=1, max_size=6), extra=st.integers(1, 64))
    def start(self, index: int, content: str, extra: int) -> None:
        if self.tables[index]:
            return
        names = [content[: end + 1].encode() for end in range(len(content) - 1)]
        num_tokens = 64 * (len(content) - 1) + extra
        matched = self.manager.match(names)
        assert [self.held[block_id] for block_id in matched] == names[: len(matched)]
        assert all(name in self.known() for name in names[: len(matched)])
        assert len(matched) == len(names) or names[len(matched)] not in self.known()
        num_revived = sum(name in self.unused for name in names[: len(matched)])
        num_new = len(content) - len(matched)
        assert self.manager.can_start(matched, num_tokens) == (num_new <= self.manager.num_free - num_revived)
        if self.manager.can_start(matched, num_tokens):
            self.unused = [name for name in self.unused if name not in names[: len(matched)]]
            self.make_way(num_new)
            self.manager.start(self.tables[index], matched, num_tokens)
            self.contents[index], self.num_shared[index] = content.encode(), len(matched)

    @rule(index=st.integers(0, NUM_TABLES - 1), letter=st.sampled_from([b"a", b"b"]))
    def grow(self, index: int, letter: bytes) -> None:
        table = self.tables[index]
        assert self.manager.can_grow(table, 64 * len(table) + 1) == bool(self.manager.num_free)
        if self.manager.num_free:
            self.make_way(1)
            self.manager.grow(table, 64 * len(table) + 1)
            self.contents[index] += letter

    @rule(index=st.integers(0, NUM_TABLES - 1))
    def share_the_next(self, index: int) -> None:
        at = self.num_shared[index]
        if at < len(self.tables[index]):
            name = self.contents[index][: at + 1]
            if name not in self.known():
                self.held[self.tables[index][at]] = name
            self.unused = [other for other in self.unused if other != name]
            self.manager.share(self.tables[index], at, name)
            assert self.held[self.tables[index][at]] == name
            self.num_shared[index] += 1

    @rule(index=st.integers(0, NUM_TABLES - 1))
    def release(self, index: int) -> None:
        names = [self.held[block_id] for block_id in reversed(self.tables[index]) if block_id in self.held]
        self.manager.release(self.tables[index])
        self.contents[index], self.num_shared[index] = b"", 0
        self.unused += [name for name in names if name not in self.used()]

    @rule(names=st.lists(st.text("ab", min_size=1, max_size=4), max_size=2))
    def forget(self, names: list[str]) -> None:
        self.manager.forget([name.encode() for name in names])
        self.unused = [name for name in self.unused if name.decode() not in names]
        self.held = {block_id: name for block_id, name in self.held.items() if name.decode() not in names}
        # A table goes on sharing behind a block that nobody finds any more.

    @invariant()
    def nothing_is_lost(self) -> None:
        self.manager.check_integrity(self.tables)
        assert self.manager.num_cached == len(self.unused)
        assert all(self.manager.match([name]) for name in self.unused)

    def used(self) -> set[bytes]:
        return {self.held[block_id] for table in self.tables for block_id in table if block_id in self.held}

    def known(self) -> set[bytes]:
        return self.used() | set(self.unused)

    def make_way(self, num_blocks: int) -> None:
        """What must be gone once num_blocks new blocks were handed out."""
        num_empty = self.manager.num_free - self.manager.num_cached
        gone = self.unused[: max(0, num_blocks - num_empty)]
        self.unused = self.unused[len(gone) :]
        self.held = {block_id: name for block_id, name in self.held.items() if name not in gone}


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_blocks_that_only_some_tables_use_are_counted_once() -> None:
    manager = BlockManager(8)
    tables: list[list[int]] = [[], [], []]
    manager.start(tables[0], [], 3 * BLOCK_SIZE)
    for index, name in enumerate((b"a", b"b")):
        manager.share(tables[0], index, name)
    for table in tables[1:]:
        manager.start(table, manager.match([b"a", b"b"]), 3 * BLOCK_SIZE)
    assert manager.num_used_by([], tables[:2]) == 2  # the third table has the first two blocks of each
    assert manager.num_used_by([], tables) == 5
    assert manager.num_used_by(manager.match([b"a"]), tables) == 4
