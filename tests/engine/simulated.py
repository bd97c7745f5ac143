"""A model runner without a model: it checks what a real one would rely on, and its tokens are a known function.

Keys and values are stood in for by one number a token, which follows from the token, from the arithmetic that computed
it and from all tokens before it, as the real ones do. Its device may be asynchronous: then it computes a step when the
step is collected, or just before it would have to hold a third one, with what the launch handed over and nothing that
the host changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from nibble.engine.batch import Batch, Chunk
from nibble.engine.model_config import ModelConfig
from nibble.engine.model_runner import ModelRunner, PendingStep
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.engine.swap_space import BlockMove
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import BLOCK_SIZE

VOCAB_SIZE = 1000
MAX_EXPECTED = 1024  # sequences, so that a long simulation does not grow
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=64,
    max_context_tokens=4096,
    rms_norm_eps=1e-5,
)


def token_at(seed: int, index: int) -> int:
    """Token `index` of the request with this seed."""
    return (seed * 7919 + index * 104729) % (VOCAB_SIZE - 1) + 1


def request(
    request_id: str,
    *,
    num_prompt_tokens: int = 5,
    max_tokens: int = 10,
    seed: int = 0,
    arrival_s: float = 0.0,
    priority: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    min_tokens: int = 0,
    deadline_s: float | None = None,
    prompt: list[int] | None = None,
    cache_salt: str = "",
) -> GenerationRequest:
    """The prompt is num_prompt_tokens tokens that follow from the seed, unless it is given."""
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt or [1 + (seed + i) % (VOCAB_SIZE - 1) for i in range(num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=stop_token_ids, min_tokens=min_tokens),
        arrival_s=arrival_s,
        priority=priority,
        deadline_s=deadline_s,
        cache_salt=cache_salt,
    )


@dataclass(frozen=True)
class Work:
    """What a launch copies of a chunk."""

    sequence: Sequence
    start: int
    stop: int  # without drafts
    token_ids: list[int | None]  # of start..stop; None: the device alone knows it ...
    drafts: list[int]
    newest_row: int  # ... here
    block_table: list[int]
    samples: bool


class SimulatedKernels:
    def __init__(self, is_asynchronous: bool) -> None:
        self.is_asynchronous = is_asynchronous

    def num_prefill_tokens(self, num_prompt_tokens: int) -> int:
        """As of the backends."""
        if not self.is_asynchronous:
            return num_prompt_tokens
        return (num_prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE if num_prompt_tokens > 128 else 0


class SimulatedRunner(ModelRunner):
    """Remembers what was written to which KV slot, and refuses to attend to a context that is not there."""

    def __init__(
        self, num_blocks: int, max_num_batched_tokens: int, is_asynchronous: bool = False, num_swap_blocks: int = 0
    ) -> None:
        self.kernels = cast(Kernels, SimulatedKernels(is_asynchronous))
        self.num_blocks = num_blocks
        self.num_swap_blocks = num_swap_blocks
        self.swapped = [[0] * BLOCK_SIZE for _ in range(num_swap_blocks)]
        self.kv_cache = np.zeros((1, num_blocks, 1, 1), np.uint8)
        self.blocks = [[0] * BLOCK_SIZE for _ in range(num_blocks)]  # what stands for the keys and values in them
        self._expected: dict[str, tuple[Sequence, list[int]]] = {}  # what must be in a sequence's slots, by request id
        self.latest: dict[int, tuple[Sequence, int]] = {}  # row -> whose, its newest token id
        self.max_num_batched_tokens = max_num_batched_tokens
        self.nonfinite: set[str] = set()
        self.nonfinite_from: dict[str, int] = {}  # generated token of a request whose logits are not finite
        self.num_launched = 0
        self.num_collected = 0
        self.wait_s = 0.0

    def launch(self, batch: Batch) -> PendingStep:
        assert batch.num_tokens <= self.max_num_batched_tokens
        assert len({chunk.sequence.request_id for chunk in batch.chunks}) == len(batch.chunks)
        assert self.num_launched - self.num_collected <= self.kernels.is_asynchronous
        self.num_launched += 1
        for chunk in batch.chunks:
            assert chunk.sequence.is_prefilling == (chunk in batch.prefill)
            assert not chunk.sequence.is_complete
        work = [self._work(chunk) for chunk in batch.chunks]
        self._advance(batch)
        for chunk in batch.chunks:
            sequence = chunk.sequence
            assert chunk not in batch.prefill or sequence.num_computed_tokens <= sequence.num_prefill_tokens
            samples = chunk.num_samples > 0
            assert samples == (sequence.num_computed_tokens == sequence.num_tokens - samples)
        copy = SimulatedCopy(lambda: self._compute(work, [*batch.moves]))
        return PendingStep(batch, copy, num_bytes=batch.num_tokens, launched_s=0.0)

    def collect(self, step: PendingStep) -> list[tuple[Sequence, list[int]]]:
        self.num_collected += 1
        return super().collect(step)

    def forget_sequences(self) -> None:
        """What it worked out of them; the device's memory stays."""
        self._expected.clear()
        self.latest.clear()

    def _work(self, chunk: Chunk) -> Work:
        sequence = chunk.sequence
        start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + chunk.num_tokens
        drafts = sequence.drafts[: chunk.num_drafts]
        stop -= len(drafts)
        token_ids: list[int | None] = [*sequence.token_ids[start:stop]]
        if len(token_ids) < stop - start:
            token_ids.append(None)
            assert self.kernels.is_asynchronous
            assert not drafts, "the tokens before drafts are read"
        assert len(token_ids) + len(drafts) == chunk.num_tokens
        samples, table = chunk.num_samples > 0, [*sequence.block_table]
        return Work(sequence, start, stop, token_ids, drafts, sequence.sample_row, table, samples)

    def _compute(self, step: list[Work], moves: list[BlockMove]) -> npt.NDArray[np.int32]:
        for move in moves:
            if move.to_host:
                self.swapped[move.host_block] = [*self.blocks[move.block_id]]
            else:
                self.blocks[move.block_id] = [*self.swapped[move.host_block]]
        for work in step:
            self._attend(work)
        for work in step:  # all of a step read before any of it writes: nobody may rely on what the same step computes
            self._write(work)
        row = 0
        for work in step:
            if not work.samples:
                continue
            sequence = work.sequence
            first = work.stop - sequence.num_prompt_tokens
            bad = 0 if sequence.request_id in self.nonfinite else self.nonfinite_from.get(sequence.request_id)
            right = _tokens(sequence, work.stop, work.stop + 1 + len(work.drafts))
            for index, newest in enumerate(right):
                drawn = newest if work.drafts[:index] == right[:index] else newest // 2
                self.latest[row] = (sequence, -1 if bad is not None and first + index >= bad else drawn)
                row += 1
        num_rows = max(self.latest, default=-1) + 1
        return np.array([self.latest[row][1] for row in range(num_rows)], np.int32)

    def _attend(self, work: Work) -> None:
        expected = self._kv_values(work)
        for block_id, start, stop in _blocks(work, 0, work.start):
            assert self.blocks[block_id][: stop - start] == expected[start:stop], "the context is not there"

    def _write(self, work: Work) -> None:
        token_ids = work.token_ids
        if token_ids[-1] is None:
            owner, newest = self.latest[work.newest_row]
            assert owner is work.sequence
            token_ids = [*token_ids[:-1], newest]
        if work.sequence.request_id not in self.nonfinite:
            assert token_ids == _tokens(work.sequence, work.start, work.stop)
        expected = self._kv_values(work)
        for block_id, start, stop in _blocks(work, work.start, work.stop):
            first = start % BLOCK_SIZE
            self.blocks[block_id][first : first + stop - start] = expected[start:stop]
        value = expected[work.stop - 1]
        for position, draft in enumerate(work.drafts, work.stop):
            value = hash((value, draft, False))
            self.blocks[work.block_table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = value

    def _kv_values(self, work: Work) -> list[int]:
        """What must be in the slots of a sequence's tokens, those of this step included."""
        sequence = work.sequence
        owner, values = self._expected.get(sequence.request_id, (None, []))
        if owner is not sequence:
            if len(self._expected) >= MAX_EXPECTED:
                self._expected.clear()
            values = []
            self._expected[sequence.request_id] = (sequence, values)
        value = values[-1] if values else 0
        if len(values) >= work.stop:
            return values
        for position, token_id in enumerate(_tokens(sequence, len(values), work.stop), len(values)):
            value = hash((value, token_id, position < sequence.num_prefill_tokens))
            values.append(value)
        return values


class RecordingRunner(SimulatedRunner):
    """Keeps what each step computed: request id -> tokens."""

    def __init__(self, num_blocks: int, max_num_batched_tokens: int, is_asynchronous: bool) -> None:
        super().__init__(num_blocks, max_num_batched_tokens, is_asynchronous)
        self.steps: list[dict[str, int]] = []

    def launch(self, batch: Batch) -> PendingStep:
        self.steps.append({chunk.sequence.request_id: chunk.num_tokens for chunk in batch.chunks})
        return super().launch(batch)


@dataclass(frozen=True)
class SimulatedCopy:
    compute: Callable[[], npt.NDArray[np.int32]]

    def wait(self) -> npt.NDArray[np.int32]:
        return self.compute()


def _blocks(work: Work, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The blocks of positions start..stop, with the part of these positions that is in each."""
    for first in range(start - start % BLOCK_SIZE, stop, BLOCK_SIZE):
        yield work.block_table[first // BLOCK_SIZE], max(first, start), min(first + BLOCK_SIZE, stop)


def _tokens(sequence: Sequence, start: int, stop: int) -> list[int]:
    """What a sequence's tokens at these positions must be."""
    num_prompt, seed = sequence.num_prompt_tokens, sequence.request.sampling.seed
    generated = [token_at(seed, position - num_prompt) for position in range(max(start, num_prompt), stop)]
    return sequence.request.prompt_token_ids[start:stop] + generated
