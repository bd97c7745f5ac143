"""Continuous batching: which tokens of which sequences the next step computes.

Sequences join and leave at any step. One token budget is shared by decode and chunked prefill, decode first, so that
inter-token latency holds while long prompts are prefilled. When blocks run out, the youngest sequence of the lowest
priority is preempted: its blocks are released and all its tokens are computed again later.

Steps may still be under way when the next one is scheduled, so tokens count from the launch of the step that samples
them (see `sequence.py`). Blocks change hands at once all the same: the device computes one step after the other, so
whatever an earlier step still writes to a block is there before its new owner's first token.
"""

from __future__ import annotations

from bisect import insort

from nibble.engine.batch import Batch, Chunk
from nibble.engine.block_manager import BlockManager
from nibble.engine.sequence import Sequence


class Scheduler:
    """Owns the queue of waiting sequences and the list of running ones."""

    def __init__(self, block_manager: BlockManager, *, max_num_sequences: int, max_num_batched_tokens: int) -> None:
        assert max_num_batched_tokens >= max_num_sequences, "every running sequence must fit into one step"
        self.block_manager = block_manager
        self.max_num_sequences = max_num_sequences
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # in order of service
        self.running: list[Sequence] = []  # in order of service
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all of the same or a higher priority (a lower number)."""
        insort(self.waiting, sequence, key=_service_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence; its blocks are free at once."""
        for sequences in (self.running, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)
        self.block_manager.release(sequence.block_table)

    def schedule(self) -> Batch:
        """The next step's work. Empty only if every sequence's last token is sampled already, or there are none."""
        for sequence in [sequence for sequence in self.running if sequence.is_complete]:
            self.remove(sequence)  # its last token is still unread, but room for another one is there now
        decode = self._schedule_decode()
        budget = self.max_num_batched_tokens - sum(chunk.num_tokens for chunk in decode)
        return Batch(prefill=self._schedule_prefill(budget), decode=decode)

    def _schedule_decode(self) -> list[Chunk]:
        """One token per running sequence, more where generated tokens must be recomputed."""
        chunks: list[Chunk] = []
        # In service order, so that whoever is preempted for want of blocks has no chunk in this step yet.
        decoding = [sequence for sequence in self.running if not sequence.is_prefilling]
        budget = self.max_num_batched_tokens - len(decoding)
        for sequence in decoding:
            if not sequence.block_table:  # preempted for one before it
                continue
            num_missing = sequence.num_tokens - sequence.num_computed_tokens
            num_tokens = 1 + min(num_missing - 1, budget)
            if self._make_room(sequence, sequence.num_computed_tokens + num_tokens):
                budget -= num_tokens - 1
                chunks.append(Chunk(sequence, num_tokens, samples=num_tokens == num_missing))
        return chunks

    def _schedule_prefill(self, budget: int) -> list[Chunk]:
        """Prompt chunks: first of sequences that began, then of new ones while they fit."""
        chunks: list[Chunk] = []
        for sequence in [sequence for sequence in self.running if sequence.is_prefilling]:
            budget -= self._add_prefill_chunk(chunks, sequence, budget)
        while budget > 0 and self.waiting and len(self.running) < self.max_num_sequences:
            sequence = self.waiting[0]
            # A new sequence starts only if its whole prompt fits, so that it does not preempt those that run.
            if not self.block_manager.can_grow(sequence.block_table, sequence.num_tokens):
                break
            self.block_manager.grow(sequence.block_table, sequence.num_tokens)
            insort(self.running, self.waiting.pop(0), key=_service_order)
            budget -= self._add_prefill_chunk(chunks, sequence, budget)
        return chunks

    def _add_prefill_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Append the sequence's next prompt chunk of at most budget tokens; returns its length."""
        num_missing = sequence.num_prompt_tokens - sequence.num_computed_tokens
        num_tokens = min(num_missing, budget)
        if num_tokens > 0:
            is_last = num_tokens == num_missing and sequence.num_generated_tokens == 0
            chunks.append(Chunk(sequence, num_tokens, samples=is_last))
        return num_tokens

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow the sequence's blocks, preempting from the back of the service order. False: it was itself the last."""
        while not self.block_manager.can_grow(sequence.block_table, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.block_manager.grow(sequence.block_table, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.block_manager.release(sequence.block_table)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        self.add(sequence)


def _service_order(sequence: Sequence) -> tuple[int, float, str]:
    return (sequence.request.priority, sequence.request.arrival_s, sequence.request_id)
