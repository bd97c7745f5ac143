"""A hundred thousand requests through the engine over a simulated model: memory stays flat, nothing is lost or starves.

Conversations over common system prompts, of all priorities, join whenever there is room in the queue, are aborted, stop
early, and come to more blocks than there are. Some of what is preempted goes to the host's memory, and drafts come from
a drafter that keeps the text of each.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from simulated import CONFIG, SimulatedRunner, request, token_at

from nibble.engine.limits import MAX_DRAFTS, EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import PRIORITY_S, FinishReason, GenerationRequest
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import NgramDrafter, Speculation, StepCost

NUM_REQUESTS = 100_000
NUM_WARM_UP = 20_000  # until all tables, caches and free lists have had their size
NUM_BLOCKS = 56
NUM_SWAP_BLOCKS = 8
MAX_WAITING = 60
STEP_S = 0.05
SYSTEM_PROMPTS = [[1 + (37 * family + i) % 999 for i in range(20 + 20 * family)] for family in range(8)]


class KeepingDrafter(NgramDrafter):
    """Keeps the texts, in which there is no repetition; of some requests it knows the tokens, of others wrong ones."""

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        super().propose(wishes)
        return [self._propose(each, each.request.sampling.seed, count) for each, count in wishes.items()]

    def _propose(self, sequence: Sequence, seed: int, count: int) -> list[int]:
        if seed % 8 == 0:
            return [token_at(seed, sequence.num_read_tokens + i) for i in range(count)]
        return [1] * count if seed % 8 == 1 else []

    def is_promising(self, sequence: Sequence) -> bool:
        return True


class Traffic:
    """What the outside does with an engine, and what it saw of each request that has not ended."""

    def __init__(self, is_asynchronous: bool) -> None:
        self.now_s = 0.0
        limits = EngineLimits(0, max_num_sequences=32, max_num_batched_tokens=512)
        runner = SimulatedRunner(NUM_BLOCKS, 512, is_asynchronous, NUM_SWAP_BLOCKS)
        speculation = Speculation(KeepingDrafter(), MAX_DRAFTS, StepCost(token=0.0))  # which costs nothing
        self.engine = LLMEngine(runner, CONFIG, limits, lambda: self.now_s, speculation=speculation)
        self.running: dict[str, tuple[GenerationRequest, int]] = {}  # and how many tokens it has
        self.num_added = 0
        self.num_stopped = 0
        self.longest_s = 0.0  # from arrival to end
        self._random = random.Random(0)
        self._conversations = [list(prompt) for prompt in SYSTEM_PROMPTS for _ in range(4)]

    def until(self, num_requests: int) -> None:
        """Go on until so many were added in all and the engine has none left."""
        while self.num_added < num_requests or self.running:
            while self.num_added < num_requests and len(self.engine.scheduler.waiting) < MAX_WAITING:
                self._add()
            self._step()
            if self._random.random() < 0.05 and self.running:
                name = self._random.choice(list(self.running))
                self.engine.abort(name)
                del self.running[name]
        assert not self.engine.has_unfinished
        self.engine.step()  # what was launched for the last one may still be unread

    def _add(self) -> None:
        draw = self._random
        index = draw.randrange(len(self._conversations))
        prompt = [*self._conversations[index], *(draw.randrange(1, 999) for _ in range(draw.randrange(1, 12)))]
        self._conversations[index] = prompt if len(prompt) < 240 else list(SYSTEM_PROMPTS[index // 4])
        self.num_added += 1
        each = request(
            str(self.num_added),
            prompt=prompt,
            seed=draw.randrange(1000),
            max_tokens=draw.choice([1, 1, 2, 4, 8, 40]),
            priority=draw.choice([-1, 0, 0, 0, 1]),
            stop_token_ids=(draw.randrange(1, 999), token_at(draw.randrange(1000), 5)),
            arrival_s=self.now_s,
        )
        self.running[each.request_id] = (each, 0)
        self.engine.add(each)

    def _step(self) -> None:
        self.now_s += STEP_S
        for event in self.engine.step():
            each, num_tokens = self.running[event.request_id]
            assert event.index == num_tokens
            num_after = num_tokens + len(event.token_ids)
            assert event.token_ids == [token_at(each.sampling.seed, i) for i in range(num_tokens, num_after)]
            self.running[event.request_id] = (each, num_after)
            if event.finish_reason is not None:
                self.num_stopped += event.finish_reason is FinishReason.STOP
                self.longest_s = max(self.longest_s, self.now_s - each.arrival_s)
                del self.running[event.request_id]
        if self.engine.stats.num_steps % 50 == 0:
            self.check_integrity()

    def check_integrity(self) -> None:
        scheduler = self.engine.scheduler
        scheduler.block_manager.check_integrity([s.block_table for s in [*scheduler.running, *scheduler.waiting]])
        scheduler.swap_space.check_integrity(scheduler.waiting)


def memory(traffic: Traffic) -> tuple[int, int, int]:
    """Python objects that are alive, bytes that the process has, its threads and open files."""
    assert isinstance(traffic.engine.runner, SimulatedRunner)
    traffic.engine.runner.forget_sequences()
    gc.collect()
    process = Path("/proc/self")
    num_pages = int((process / "statm").read_text().split()[1])
    num_handles = len(list((process / "task").iterdir())) + len(list((process / "fd").iterdir()))
    return len(gc.get_objects()), num_pages * 4096, num_handles


@pytest.mark.timeout(900)
def test_memory_stays_flat_and_nobody_starves_in_100000_requests() -> None:
    traffic = Traffic(is_asynchronous=True)
    traffic.until(NUM_WARM_UP)
    objects, num_bytes, handles = memory(traffic)
    traffic.until(NUM_REQUESTS)
    objects_after, bytes_after, handles_after = memory(traffic)
    stats = traffic.engine.stats
    sys.stdout.write(
        f"{stats}\nlongest_s={traffic.longest_s:.1f} stopped={traffic.num_stopped} "
        f"objects {objects} -> {objects_after} bytes {num_bytes} -> {bytes_after}\n"
    )
    assert objects_after - objects < 200, "objects are kept"
    assert bytes_after - num_bytes < 8 << 20, "memory grows"
    assert handles_after == handles, "threads or files are kept"
    assert stats.num_preemptions > 1000
    assert stats.num_swapped_in > 100
    assert stats.num_accepted_tokens > 100
    assert stats.num_cache_hits > stats.num_cache_queries // 4
    assert traffic.num_stopped > 100
    # Two priorities are apart at most; the rest is the queue's length at the engine's speed.
    assert traffic.longest_s < 2 * PRIORITY_S + 60
    assert traffic.engine.scheduler.block_manager.num_free == NUM_BLOCKS
