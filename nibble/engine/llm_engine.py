"""The engine: `add` and `abort` requests, `step` to compute. Token ids in, token events out.

A library: no HTTP, no Redis, no environment variables, no threads. One caller at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass
from pathlib import Path

from nibble.engine.batch import Batch
from nibble.engine.block_manager import BlockManager
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.errors import CapacityError, RequestError
from nibble.engine.model import DecoderModel
from nibble.engine.model_config import ModelConfig
from nibble.engine.model_runner import ModelRunner
from nibble.engine.protocol import FinishReason, GenerationRequest, TokenEvent
from nibble.engine.scheduler import Scheduler
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import BLOCK_SIZE, KVDtype, KVLayout


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may use. kv_cache_bytes is rounded down to whole blocks."""

    kv_cache_bytes: int
    max_num_sequences: int = 64
    max_num_batched_tokens: int = 512
    kv_dtype: KVDtype = KVDtype.INT8


@dataclass
class EngineStats:
    """Counters since the start, and gauges of the last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_nonfinite_logits: int = 0
    step_bytes: int = 0
    step_s: float = 0.0


class LLMEngine:
    """Generates tokens for many requests at once."""

    def __init__(
        self, runner: ModelRunner, config: ModelConfig, limits: EngineLimits, now: Callable[[], float] = time.time
    ) -> None:
        self.config = config
        self.runner = runner
        self.stats = EngineStats()
        num_blocks = runner.kv_cache.shape[1]
        self.scheduler = Scheduler(
            BlockManager(num_blocks),
            max_num_sequences=limits.max_num_sequences,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        self.max_context_tokens = min(config.max_context_tokens, num_blocks * BLOCK_SIZE)
        self._sequences: dict[str, Sequence] = {}
        self._now = now

    @classmethod
    def from_checkpoint(cls, directory: Path, kernels: Kernels, limits: EngineLimits) -> LLMEngine:
        """Load a native checkpoint directory. Raises CheckpointError, CapacityError."""
        checkpoint = load_checkpoint(directory)
        config = checkpoint.config
        layout = KVLayout(config.num_kv_heads, config.head_dim, limits.kv_dtype)
        block_bytes = config.num_layers * layout.block_bytes
        num_blocks = limits.kv_cache_bytes // block_bytes
        if num_blocks < 1:
            raise CapacityError(f"one KV block takes {block_bytes} bytes, the KV cache has {limits.kv_cache_bytes}")
        model = DecoderModel(config, kernels, checkpoint, layout)
        return cls(ModelRunner(kernels, model, num_blocks), config, limits)

    def add(self, request: GenerationRequest, generated_token_ids: TokenSequence[int] = ()) -> None:
        """Queue a request; generated_token_ids are what another worker already generated for it.

        Raises RequestError if it can never run here; nothing else is disturbed.
        """
        self._check(request)
        sequence = Sequence.start(request, generated_token_ids, self._now())
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks at once, without an event. Unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._update_gauges()

    def step(self) -> list[TokenEvent]:
        """Compute one step: schedule, run, update. Returns at most one event per request."""
        expired = self._expire()
        batch = self.scheduler.schedule()
        start_s = time.perf_counter()
        sampled = self.runner.run(batch) if batch.chunks else []
        events = [self._update(sequence, token_id) for sequence, token_id in sampled]
        self._record(batch, len(sampled), time.perf_counter() - start_s)
        return expired + events

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def weight_bytes(self) -> int:
        return self.runner.model.weight_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return int(self.runner.kv_cache.nbytes)

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens that all KV blocks together hold."""
        return self.scheduler.block_manager.num_blocks * BLOCK_SIZE

    @property
    def capacity(self) -> int:
        """How many more requests it can start now. 0 while others wait for blocks: somebody else may be free."""
        if self.scheduler.waiting or self.scheduler.block_manager.num_free == 0:
            return 0
        return self.scheduler.max_num_sequences - len(self._sequences)

    def _check(self, request: GenerationRequest) -> None:
        num_tokens = len(request.prompt_token_ids)
        if num_tokens == 0:
            raise RequestError("the prompt is empty")
        if num_tokens >= self.max_context_tokens:
            raise RequestError(f"prompt has {num_tokens} tokens, the limit is {self.max_context_tokens - 1}")
        bad = next((i for i in request.prompt_token_ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        if request.sampling.max_tokens < 1:
            raise RequestError(f"max_tokens is {request.sampling.max_tokens}, the least is 1")
        if request.request_id in self._sequences:
            raise RequestError(f"request {request.request_id} is already running")

    def _update(self, sequence: Sequence, token_id: int) -> TokenEvent:
        """Append the sampled token, or end the sequence if its logits were not finite (token_id -1)."""
        if token_id < 0:
            self.stats.num_nonfinite_logits += 1
            return self._finish(sequence, FinishReason.ERROR, "the model's logits were not finite", [])
        sequence.append(token_id, self.max_context_tokens, self._now())
        if sequence.finish_reason is not None:
            return self._finish(sequence, sequence.finish_reason, None, [token_id])
        return TokenEvent(request_id=sequence.request_id, index=sequence.num_generated_tokens - 1, token_ids=[token_id])

    def _expire(self) -> list[TokenEvent]:
        """End the sequences whose deadline has passed."""
        now_s = self._now()
        late = [s for s in self._sequences.values() if (s.request.deadline_s or now_s) < now_s]
        return [self._finish(sequence, FinishReason.ERROR, "the deadline has passed", []) for sequence in late]

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None, token_ids: list[int]) -> TokenEvent:
        self.abort(sequence.request_id)
        return TokenEvent(
            request_id=sequence.request_id,
            index=sequence.num_generated_tokens - len(token_ids),
            token_ids=token_ids,
            finish_reason=reason,
            error=error,
            metrics=sequence.metrics(self._now()),
        )

    def _record(self, batch: Batch, num_sampled: int, step_s: float) -> None:
        stats, scheduler = self.stats, self.scheduler
        for chunk in batch.chunks:
            if chunk.sequence.scheduled_s is None:
                chunk.sequence.scheduled_s = self._now() - step_s
        stats.num_steps += 1
        stats.num_prompt_tokens += sum(chunk.num_tokens for chunk in batch.prefill)
        stats.num_generated_tokens += num_sampled
        self._update_gauges()
        stats.num_preemptions = scheduler.num_preemptions
        stats.step_bytes, stats.step_s = self.runner.step_bytes(batch), step_s

    def _update_gauges(self) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.num_running, stats.num_waiting = len(scheduler.running), len(scheduler.waiting)
        stats.kv_cache_usage = scheduler.block_manager.usage
