"""Continuous batching: which tokens of which sequences the next step computes.

Sequences join and leave at any step. One token budget is shared by decode and chunked prefill, decode first, so that
inter-token latency holds while long prompts are prefilled. Everything else goes by rank (`service_order.py`): when
blocks run out, the last in that order is preempted: its blocks are released, after their content was kept in the host's
memory where there is room (`swap_space.py`), and what is neither there nor found in the cache when it starts again is
computed again. A sequence starts when there is a place in the batch and all its blocks are there; of those that run
only such of a lower priority make room for it.

Steps may still be under way when the next one is scheduled, so tokens count from the launch of the step that samples
them (see `sequence.py`). Blocks change hands at once all the same, and are shared once their step is launched: the
device computes one step after the other, so whatever an earlier step still writes to a block is there before the next
one reads it or its new owner writes it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from heapq import merge
from itertools import accumulate, islice
from operator import attrgetter

from nibble.engine.batch import MAX_VERIFIED_TOKENS, Batch, Chunk
from nibble.engine.block_manager import BlockManager, num_blocks_for
from nibble.engine.sequence import Sequence
from nibble.engine.service_order import ServiceOrder, aged_priority
from nibble.engine.swap_space import SwapSpace
from nibble.kernels.layout import BLOCK_SIZE

_by_rank = attrgetter("rank")


class Scheduler:
    """Owns the queue of waiting sequences and the list of running ones."""

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_sequences: int,
        max_num_batched_tokens: int,
        has_prefix_cache: bool = True,
        order: ServiceOrder = aged_priority,
        num_swap_blocks: int = 0,
    ) -> None:
        assert max_num_batched_tokens >= max_num_sequences, "every running sequence must fit into one step"
        self.block_manager = block_manager
        self.swap_space = SwapSpace(num_swap_blocks)
        self.max_num_sequences = max_num_sequences
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self.num_cache_queries = 0  # prompt tokens of all sequences that started ...
        self.num_cache_hits = 0  # ... and how many of them were found computed
        self._has_prefix_cache = has_prefix_cache
        self._order = order

    @property
    def ready(self) -> Iterator[Sequence]:
        """Those that wait for room alone, by rank. The others are held: their grammar is being compiled."""
        return (sequence for sequence in self.waiting if not sequence.is_held)

    @property
    def capacity(self) -> int:
        """How many more sequences can start now. 0 while others wait for room: there may be some elsewhere."""
        if any(self.ready) or self.block_manager.num_free == 0:
            return 0
        return max(0, self.max_num_sequences - len(self.running) - len(self.waiting))

    @property
    def preemptible(self) -> list[str]:
        """Without capacity, the requests whose places others may have, one each, that are served before it: those that
        are about to start, the last first, or else the running one that is served last. None of these where one that
        is served before it waits already, nor where as many wait as can run."""
        num_more = 2 * self.max_num_sequences - len(self.running) - len(self.waiting)
        if self.capacity > 0 or num_more <= 0:
            return []
        if starting := self._about_to_start():  # they would hardly run before they are preempted
            return [sequence.request_id for sequence in starting[::-1]][:num_more]
        first = next(self.ready, None)
        if not self.running or (first is not None and first.rank < self.running[-1].rank):
            return []
        return [self.running[-1].request_id]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        sequence.rank = self._order(sequence.request)
        insort(self.waiting, sequence, key=_by_rank)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence; its blocks are free at once."""
        for sequences in (self.running, self.waiting):
            if sequence in sequences:
                sequences.remove(sequence)
        self.swap_space.discard(sequence)
        self._release(sequence)

    def remove_unsound(self, sequence: Sequence) -> None:
        """The same for one whose keys and values may be wrong: nobody may find them."""
        self.block_manager.forget(sequence.block_hashes(len(sequence.token_ids) // BLOCK_SIZE))
        self.block_manager.release(sequence.block_table)
        self.remove(sequence)

    def schedule(self) -> Batch:
        """The next step's work. Empty only if every sequence's last token is sampled already, or there are none."""
        self._preempt_for_urgent()
        batch = Batch(prefill=[], decode=[])
        self._schedule_decode(batch)
        self._schedule_rest(batch)
        if batch.chunks:  # else no step is launched
            batch.moves.extend(self.swap_space.take_moves())
        return batch

    def launched(self, batch: Batch) -> None:
        """The device has been told to compute what `schedule` returned."""
        for sequence, _, num_samples, num_prompt_tokens in batch.chunks:
            if num_samples and sequence.is_complete:
                self.remove(sequence)  # its last token is still unread, but room for another one is there now
            elif num_prompt_tokens:
                self._share_blocks(sequence)

    def _schedule_decode(self, batch: Batch) -> None:
        """One token for every sequence that lacks its newest token alone, and what fits of its drafts."""
        # By rank, so that whoever is preempted for want of blocks has no chunk in this step yet.
        for sequence in [sequence for sequence in self.running if sequence.is_decoding and not sequence.is_held]:
            if sequence.block_table and self._make_room(sequence):  # else it was preempted for one before it
                batch.decode.append(Chunk(sequence, 1, 1))
        if any(chunk.sequence.drafts for chunk in batch.decode):
            self._add_drafts(batch)

    def _add_drafts(self, batch: Batch) -> None:
        """Nobody is preempted for them, and every sequence could still sample in this step."""
        spare = min(MAX_VERIFIED_TOKENS, self.max_num_batched_tokens) - len(self.running)
        for i, (sequence, *_) in enumerate(batch.decode):
            num_drafts = min(len(sequence.drafts), spare)
            num_tokens = sequence.num_computed_tokens + 1 + num_drafts
            if num_drafts > 0 and self.block_manager.can_grow(sequence.block_table, num_tokens):
                self.block_manager.grow(sequence.block_table, num_tokens)
                batch.decode[i] = Chunk(sequence, 1 + num_drafts, 1 + num_drafts)
                spare -= num_drafts

    def _schedule_rest(self, batch: Batch) -> None:
        """What is left of the budget, by rank: to sequences that lack more, and to new ones while their blocks fit."""
        budget = self.max_num_batched_tokens - batch.num_tokens
        is_rest = len(batch.decode) < len(self.running)
        begun = [s for s in self.running if not s.is_decoding and not s.is_held] if is_rest else []
        room = self.max_num_sequences - len(self.running)
        is_full = False
        for sequence in merge(begun, list(islice(self.ready, room)), key=_by_rank):
            if budget == 0:
                break
            if not sequence.block_table:
                if is_full or self._waits_for_prefix(sequence):
                    continue
                if not self._start(sequence):
                    is_full = True  # nor does anybody behind it start: they would take its blocks
                    continue
            chunk = next_chunk(sequence, budget)
            budget -= chunk.num_tokens
            (batch.prefill if sequence.is_prefilling else batch.decode).append(chunk)

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether one served before it computes its next block right now, so that it is cheaper to wait for that."""
        index = len(self._match(sequence))
        hashes = self._hashes(sequence)[index : index + 1]
        return bool(hashes) and any(
            other.num_computed_tokens < other.num_prompt_tokens
            and other.rank < sequence.rank
            and self._hashes(other)[index : index + 1] == hashes
            for other in self.running
        )

    def _start(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run. False: there are too few blocks."""
        matched = self._match(sequence)
        if not self.block_manager.can_start(matched, sequence.num_tokens):
            return False
        self.block_manager.start(sequence.block_table, matched, sequence.num_tokens)
        sequence.num_computed_tokens = self.swap_space.restore(sequence, len(matched))
        sequence.num_shared_blocks = len(matched)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
            self.num_cache_queries += sequence.num_prompt_tokens
            self.num_cache_hits += sequence.num_cached_tokens
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_by_rank)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Have a block for the sequence's next token, preempting the last in the order. False: that was itself."""
        table, num_tokens = sequence.block_table, sequence.num_computed_tokens + 1
        if num_tokens <= len(table) * BLOCK_SIZE:  # 63 of 64 times, for every sequence in every step
            return True
        self._share_blocks(sequence)
        while not self.block_manager.can_grow(table, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        self.block_manager.grow(table, num_tokens)
        return True

    def _preempt_for_urgent(self) -> None:
        """Let the first waiting sequence have the places and blocks of running ones of a lower priority, if those are
        enough for it to start at once."""
        urgent = next(self.ready, None)
        if urgent is None or not self.running or self.running[-1].rank < urgent.rank:
            return
        if self._has_room(urgent) or self._waits_for_prefix(urgent) or self._waits_for_budget(urgent):
            return
        lesser = [s for s in self.running if s.rank > urgent.rank and s.request.priority > urgent.request.priority]
        matched = self._match(urgent)
        num_blocks = self.block_manager.num_used_by(matched, [sequence.block_table for sequence in lesser])
        if not self.block_manager.can_start(matched, urgent.num_tokens - num_blocks * BLOCK_SIZE):
            return
        while lesser and not self._has_room(urgent):
            self._preempt(lesser.pop())

    def _about_to_start(self) -> list[Sequence]:
        """Waiting sequences that there is room for, whatever they may find in the cache."""
        first = list(islice(self.ready, max(0, self.max_num_sequences - len(self.running))))
        num_blocks = accumulate(num_blocks_for(sequence.num_tokens) for sequence in first)
        return [s for s, total in zip(first, num_blocks, strict=True) if total <= self.block_manager.num_free]

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether there is a place and blocks enough for a waiting sequence."""
        is_full = len(self.running) >= self.max_num_sequences
        return not is_full and self.block_manager.can_start(self._match(sequence), sequence.num_tokens)

    def _waits_for_budget(self, sequence: Sequence) -> bool:
        """Whether the next step is full with what those that are served before it lack."""
        before = (other for other in self.running if other.rank < sequence.rank)
        num_tokens = sum(other.num_tokens - other.num_computed_tokens for other in before)
        return num_tokens >= self.max_num_batched_tokens

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._share_blocks(sequence)
        self.swap_space.save(sequence, self.block_manager.num_in_common(sequence.block_table))
        self._release(sequence)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_by_rank)

    def _release(self, sequence: Sequence) -> None:
        self._share_blocks(sequence)
        self.block_manager.release(sequence.block_table)

    def _share_blocks(self, sequence: Sequence) -> None:
        """Let others find those blocks of a sequence that are full."""
        # Tokens count when they are computed, by the steps launched so far, and read.
        num_blocks = min(sequence.num_computed_tokens, len(sequence.token_ids)) // BLOCK_SIZE
        if self._has_prefix_cache and sequence.block_table and num_blocks > sequence.num_shared_blocks:
            hashes = sequence.block_hashes(num_blocks)
            for index in range(sequence.num_shared_blocks, num_blocks):
                self.block_manager.share(sequence.block_table, index, hashes[index])
            sequence.num_shared_blocks = num_blocks

    def _match(self, sequence: Sequence) -> list[int]:
        return self.block_manager.match(self._hashes(sequence))

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        """Of the blocks that a sequence may find: one token at least is left to compute, for its logits.

        All of the prompt is, where its log probabilities are still to be sent.
        """
        if not self._has_prefix_cache or sequence.prompt_logprobs is not None:
            return []
        return sequence.block_hashes((sequence.num_tokens - 1) // BLOCK_SIZE)


def next_chunk(sequence: Sequence, budget: int) -> Chunk:
    """The next tokens of a sequence, at most budget, of one mode."""
    stop = sequence.num_prefill_tokens if sequence.is_prefilling else sequence.num_tokens
    num_tokens = min(stop - sequence.num_computed_tokens, budget)
    is_last = sequence.num_computed_tokens + num_tokens == sequence.num_tokens
    num_prompt_tokens = min(max(sequence.num_prompt_tokens - sequence.num_computed_tokens, 0), num_tokens)
    return Chunk(sequence, num_tokens, int(is_last), num_prompt_tokens)
