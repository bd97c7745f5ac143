"""Which blocks of the host's memory keep what preempted sequences had computed. Bookkeeping only.

A block moves over the bus at least ten times as fast as it is computed again (docs/performance.md). The device moves
it, in the order in which it is told here and before the step that is launched next: a block that is given away by
`save` still has its old content then, and one that `restore` fills has it when the step begins. Where the space is
full, or too small, sequences are computed again; so they are on a backend whose memory is the host's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nibble.engine.block_manager import num_blocks_for
from nibble.engine.sequence import Sequence
from nibble.kernels.layout import BLOCK_SIZE


class BlockMove(NamedTuple):
    """One block of all layers, to the host's memory or back."""

    block_id: int
    host_block: int
    to_host: bool


@dataclass(frozen=True)
class _Saved:
    first_block: int  # of the sequence's table; those before it are somebody else's too
    num_tokens: int
    host_blocks: list[int]


class SwapSpace:
    """A pool of num_blocks blocks; none: nothing is ever saved."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_saved = 0  # sequences
        self.num_restored = 0  # sequences
        self._free = list(range(num_blocks))
        self._saved: dict[Sequence, _Saved] = {}
        self._moves: list[BlockMove] = []

    @property
    def num_used(self) -> int:
        """Blocks that keep something."""
        return self.num_blocks - len(self._free)

    def save(self, sequence: Sequence, first_block: int) -> None:
        """Keep a sequence's blocks from first_block on, if there is room, for when it gets others instead."""
        assert sequence not in self._saved, f"{sequence.request_id} is saved already"
        blocks = sequence.block_table[first_block : num_blocks_for(sequence.num_computed_tokens)]
        if not blocks or len(blocks) > len(self._free):
            return
        host_blocks = [self._free.pop() for _ in blocks]
        self.num_saved += 1
        self._saved[sequence] = _Saved(first_block, sequence.num_computed_tokens, host_blocks)
        self._moves += [BlockMove(*pair, to_host=True) for pair in zip(blocks, host_blocks, strict=True)]

    def restore(self, sequence: Sequence, num_found: int) -> int:
        """Fill the table of a sequence that starts, whose first num_found blocks have their content; -> how many of its
        tokens are computed then.

        What was kept is of no use unless all before it was found. It is kept no longer, whether of use or not.
        """
        num_tokens, saved = num_found * BLOCK_SIZE, self._saved.pop(sequence, None)
        if saved is None:
            return num_tokens
        if num_tokens >= saved.num_tokens or num_found < saved.first_block:
            self._forget(saved)
            return num_tokens
        self._free += saved.host_blocks
        first = num_found - saved.first_block
        blocks = sequence.block_table[num_found:]
        # The table is longer, by the room for the next token.
        self._moves += [
            BlockMove(*pair, to_host=False) for pair in zip(blocks, saved.host_blocks[first:], strict=False)
        ]
        self.num_restored += 1
        return saved.num_tokens

    def discard(self, sequence: Sequence) -> None:
        """Keep nothing of a sequence any more."""
        saved = self._saved.pop(sequence, None)
        if saved is not None:
            self._forget(saved)

    def take_moves(self) -> list[BlockMove]:
        """What the device has to do before the step to be launched now, in this order."""
        moves, self._moves = self._moves, []
        return moves

    def check_integrity(self, waiting: list[Sequence]) -> None:
        """Assert that nothing is lost, and kept for waiting sequences alone."""
        assert set(self._saved) <= set(waiting), "blocks are kept for a sequence that does not wait"
        kept = [block for saved in self._saved.values() for block in saved.host_blocks]
        assert sorted([*self._free, *kept]) == list(range(self.num_blocks)), "a block is lost, or kept twice"

    def _forget(self, saved: _Saved) -> None:
        """Nor may a move that is still to come write to what somebody else may have by then."""
        self._free += saved.host_blocks
        self._moves = [move for move in self._moves if move.host_block not in saved.host_blocks]
