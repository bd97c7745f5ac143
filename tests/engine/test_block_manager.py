"""BlockManager: every block is free or owned once, after any sequence of operations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.engine.block_manager import BlockManager, num_blocks_for


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


@settings(max_examples=100, deadline=None)
@given(
    num_blocks=st.integers(1, 20),
    operations=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.booleans()), max_size=60),
)
def test_no_block_is_lost_or_shared(num_blocks: int, operations: list[tuple[int, int, bool]]) -> None:
    manager = BlockManager(num_blocks)
    tables: list[list[int]] = [[] for _ in range(6)]
    for index, num_tokens, release in operations:
        if release:
            manager.release(tables[index])
        elif manager.can_grow(tables[index], num_tokens):
            manager.grow(tables[index], num_tokens)
            assert len(tables[index]) >= num_blocks_for(num_tokens)
        manager.check_integrity(tables)
    assert manager.num_free == num_blocks - sum(map(len, tables))
