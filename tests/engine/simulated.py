"""A model runner without a model: it checks what a real one would rely on, and its tokens are a known function."""

from __future__ import annotations

import numpy as np

from nibble.engine.batch import Batch
from nibble.engine.model_config import ModelConfig
from nibble.engine.model_runner import ModelRunner
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.kernels.layout import BLOCK_SIZE

VOCAB_SIZE = 1000
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
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=[1 + (seed + i) % (VOCAB_SIZE - 1) for i in range(num_prompt_tokens)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=stop_token_ids, min_tokens=min_tokens),
        arrival_s=arrival_s,
        priority=priority,
        deadline_s=deadline_s,
    )


class SimulatedRunner(ModelRunner):
    """Remembers which token was written to which KV slot, and refuses to attend to a context that is not there."""

    def __init__(self, num_blocks: int, max_num_batched_tokens: int) -> None:
        self.kv_cache = np.zeros((1, num_blocks, 1, 1), np.uint8)
        self.slots: dict[int, tuple[str, int, int]] = {}  # slot -> request, position, token id
        self.max_num_batched_tokens = max_num_batched_tokens
        self.nonfinite: set[str] = set()

    def run(self, batch: Batch) -> list[tuple[Sequence, int]]:
        assert batch.num_tokens <= self.max_num_batched_tokens
        assert len({chunk.sequence.request_id for chunk in batch.chunks}) == len(batch.chunks)
        sampled = []
        for chunk in batch.chunks:
            sequence = chunk.sequence
            is_prompt = sequence.num_computed_tokens < sequence.num_prompt_tokens
            assert is_prompt == (chunk in batch.prefill)
            self._compute(sequence, chunk.num_tokens)
            assert not is_prompt or sequence.num_computed_tokens <= sequence.num_prompt_tokens
            assert chunk.samples == (sequence.num_computed_tokens == sequence.num_tokens)
            if chunk.samples:
                token_id = token_at(sequence.request.sampling.seed, sequence.num_generated_tokens)
                sampled.append((sequence, -1 if sequence.request_id in self.nonfinite else token_id))
        return sampled

    def step_bytes(self, batch: Batch) -> int:
        return batch.num_tokens

    def _compute(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed_tokens
        for position in range(start, start + num_tokens):
            self.slots[self._slot(sequence, position)] = self._entry(sequence, position)
        for position in range(start + num_tokens):
            assert self.slots[self._slot(sequence, position)] == self._entry(sequence, position)
        sequence.num_computed_tokens += num_tokens

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def _entry(self, sequence: Sequence, position: int) -> tuple[str, int, int]:
        return (sequence.request_id, position, sequence.token_ids[position])
