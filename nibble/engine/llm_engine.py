"""The engine: `add` and `abort` requests, `step` to compute. Token ids in, token events out.

A library: no HTTP, no Redis, no environment variables, no threads. One caller at a time.

On an asynchronous backend the device never waits for the host: a step is launched before the results of the one before
it are read, so events come one call of `step` late. That a sequence has reached its length is known when its last step
is launched; a stop token is found when it is read, and what the step launched meanwhile computed for it is dropped.
Where drafts are worth that the device waits (`speculative.py`), a step is read before the next one is launched.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as TokenSequence
from pathlib import Path

from nibble.engine.batch import Batch
from nibble.engine.block_manager import BlockManager
from nibble.engine.checkpoint.native import Checkpoint, load_checkpoint
from nibble.engine.draft_model import check_same_tokenizer, make_speculation
from nibble.engine.errors import CapacityError, RequestError
from nibble.engine.grammar import Constraints
from nibble.engine.limits import EngineLimits
from nibble.engine.memory_plan import make_runners
from nibble.engine.model import DecoderModel
from nibble.engine.model_config import ModelConfig
from nibble.engine.model_runner import ModelRunner, PendingStep
from nibble.engine.protocol import FinishReason, GenerationRequest, InvalidSampling, TokenEvent, check_sampling
from nibble.engine.scheduler import Scheduler
from nibble.engine.sequence import Sequence
from nibble.engine.service_order import ServiceOrder, aged_priority
from nibble.engine.speculative import FORCED_ACCEPTANCE, Speculation
from nibble.engine.stats import EngineStats
from nibble.engine.token_events import Ending, exhausted, token_event
from nibble.grammar.compiler import GrammarCompiler
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import BLOCK_SIZE

TOKENIZER_FILE = "tokenizer.json"  # of a checkpoint directory


class LLMEngine:
    """Generates tokens for many requests at once."""

    def __init__(
        self,
        runner: ModelRunner,
        config: ModelConfig,
        limits: EngineLimits,
        now: Callable[[], float] = time.time,
        order: ServiceOrder = aged_priority,
        constraints: Constraints | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """constraints: without them, requests with a grammar are refused."""
        self.config = config
        self.constraints = constraints
        self.speculation = speculation
        self.runner = runner
        self.stats = EngineStats()
        self.scheduler = Scheduler(
            BlockManager(runner.num_blocks),
            max_num_sequences=limits.max_num_sequences,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            has_prefix_cache=limits.has_prefix_cache,
            order=order,
            num_swap_blocks=runner.num_swap_blocks,
        )
        self.stats.look_at(self.scheduler)
        self.max_context_tokens = min(config.max_context_tokens, runner.num_blocks * BLOCK_SIZE)
        self._sequences: dict[str, Sequence] = {}
        self._max_pending_steps = 1 if runner.kernels.is_asynchronous else 0  # between two calls of `step`
        self._pending: deque[PendingStep] = deque()
        self._reads_first = False  # what is pending, before the next step is launched
        self._collected_s = 0.0
        self._now = now

    @classmethod
    def from_checkpoint(cls, directory: Path, kernels: Kernels, limits: EngineLimits) -> LLMEngine:
        """Load a native checkpoint directory. Raises CheckpointError, CapacityError, DraftModelError."""
        if limits.draft_model_dir is not None:
            check_same_tokenizer(directory / TOKENIZER_FILE, limits.draft_model_dir / TOKENIZER_FILE)
        engine = cls.load(load_checkpoint(directory), kernels, limits)
        config, tokenizer_file = engine.config, directory / TOKENIZER_FILE
        if tokenizer_file.exists():
            engine.constraints = Constraints(GrammarCompiler(tokenizer_file, config.vocab_size, config.eos_token_ids))
        return engine

    @classmethod
    def load(cls, checkpoint: Checkpoint, kernels: Kernels, limits: EngineLimits) -> LLMEngine:
        """Bring the weights to the device and plan its memory. Raises UnsupportedModelError, CapacityError;
        CheckpointError, where a draft model cannot be read."""
        checkpoints = [checkpoint]
        if limits.draft_model_dir is not None:
            checkpoints.append(load_checkpoint(limits.draft_model_dir))
        try:
            models = [DecoderModel.load(kernels, each, limits.kv_dtype) for each in checkpoints]
        except MemoryError as error:
            raise CapacityError(f"the weights do not fit into the device's memory: {error}") from error
        runner, *draft_runners = make_runners(kernels, models, limits)
        return cls(runner, checkpoint.config, limits, speculation=make_speculation(runner, draft_runners, limits))

    def check(self, request: GenerationRequest) -> None:
        """Raises RequestError if it can never run here."""
        self._check(request, 0)

    def add(self, request: GenerationRequest, generated_token_ids: TokenSequence[int] = ()) -> None:
        """Queue a request; generated_token_ids are what another worker already generated for it.

        Raises RequestError if it can never run here; nothing else is disturbed.
        """
        self._check(request, len(generated_token_ids))
        sequence = Sequence.start(
            request,
            generated_token_ids,
            self.max_context_tokens,
            self._now(),
            self.runner.kernels.num_prefill_tokens(len(request.prompt_token_ids)),
        )
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)
        if request.grammar is not None and self.constraints is not None:
            self.constraints.start(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks at once, without an event. Unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            if self.constraints is not None:
                self.constraints.forget(sequence)
            if self.speculation is not None:
                self.speculation.drafter.forget(sequence)
            self.stats.look_at(self.scheduler)

    def step(self) -> list[TokenEvent]:
        """Schedule a step and launch it, then read what is due. Returns the events in order, a few per request."""
        events = self._expire()
        if self._reads_first and self._pending:
            events += self._collect()
        events += self._release_held()
        batch = self.scheduler.schedule()
        if batch.chunks:
            self._launch(batch)
        is_due = len(self._pending) > (self._max_pending_steps if batch.chunks else 0)
        events += self._collect() if is_due else []
        self.stats.look_at(self.scheduler)
        return events

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
        """How many more requests it can start now."""
        return self.scheduler.capacity

    @property
    def preemptible(self) -> list[str]:
        """Without capacity, the requests whose places others may have, one each, that are served before it."""
        return self.scheduler.preemptible

    def _check(self, request: GenerationRequest, num_generated: int) -> None:
        num_tokens, limit = len(request.prompt_token_ids), self.max_context_tokens - 1
        if num_tokens == 0:
            raise RequestError("the prompt is empty")
        if num_tokens > limit:
            raise RequestError(f"prompt has {num_tokens} tokens, the limit is {limit}")
        if num_tokens + num_generated > limit:  # of a worker with more room
            raise RequestError(
                f"prompt and {num_generated} generated tokens are {num_tokens + num_generated} tokens, "
                f"the limit is {limit}"
            )
        bad = next((i for i in request.prompt_token_ids if not 0 <= i < self.config.vocab_size), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.config.vocab_size}")
        try:
            check_sampling(request.sampling, self.config.vocab_size)
        except InvalidSampling as error:
            raise RequestError(str(error)) from error
        if request.grammar is not None and self.constraints is None:
            raise RequestError("a grammar is asked for, but this model has no tokenizer file")
        if request.request_id in self._sequences:
            raise RequestError(f"request {request.request_id} is already running")

    def _launch(self, batch: Batch) -> None:
        now_s = self._now()
        for chunk in batch.chunks:
            sequence = chunk.sequence
            assert not sequence.is_held, f"{sequence.request_id}: its grammar is not known to allow anything"
            sequence.scheduled_s = now_s if sequence.scheduled_s is None else sequence.scheduled_s
            self._reads_first |= chunk.num_drafts > 0 and sequence.request.grammar is None
        self._pending.append(self.runner.launch(batch))
        self.scheduler.launched(batch)

    def _collect(self) -> list[TokenEvent]:
        """Read the oldest pending step."""
        step = self._pending.popleft()
        sampled = self.runner.collect(step)
        # A sequence may have ended since the launch, and its id may even be another one's by now.
        alive = [pair for pair in sampled if self._sequences.get(pair[0].request_id) is pair[0]]
        if self.speculation is not None:
            self.speculation.learn(alive)
        endings = self.constraints.read(alive) if self.constraints is not None else {}
        events = [self._update(sequence, token_ids, endings.get(sequence)) for sequence, token_ids in alive]
        self._prepare([sequence for sequence, _ in alive if self._sequences.get(sequence.request_id) is sequence])
        self._record(step, sum(len(event.token_ids) for event in events))
        return events

    def _prepare(self, sequences: list[Sequence]) -> None:
        """Begin to find out what may come after the tokens that were read."""
        num_running, max_forced = len(self.scheduler.running), 0
        if self.speculation is not None:
            self._reads_first = self.speculation.draft(sequences, num_running)
            max_forced = self.speculation.max_drafts(FORCED_ACCEPTANCE, num_running)
        if self.constraints is not None:
            self.constraints.fill(max_forced)

    def _update(self, sequence: Sequence, token_ids: list[int], ending: Ending | None) -> TokenEvent:
        """Append the new tokens, or end the sequence if none could be drawn."""
        if not token_ids:
            return self._finish(sequence, self._ending_without_token(sequence), [])
        is_first, now_s = sequence.first_token_s is None, self._now()
        token_ids = sequence.append(token_ids, now_s)
        if ending is not None:
            return self._finish(sequence, ending, token_ids)
        if sequence.finish_reason is not None:
            return self._finish(sequence, Ending(sequence.finish_reason), token_ids)
        return token_event(sequence, token_ids, sequence.metrics(now_s) if is_first else None)

    def _ending_without_token(self, sequence: Sequence) -> Ending:
        may_end = self.constraints is not None and self.constraints.may_end(sequence)
        if (ending := exhausted(sequence, self.config.vocab_size, may_end=may_end)) is not None:
            return ending
        self.stats.num_nonfinite_logits += 1
        self.scheduler.remove_unsound(sequence)
        return Ending(FinishReason.ERROR, "no token could be drawn: the model's logits were not finite")

    def _release_held(self) -> list[TokenEvent]:
        """Let the sequences go on whose masks are there; the events of those whose grammar does not go on."""
        if self.constraints is None:
            return []
        is_idle = not self._pending and all(sequence.is_held for sequence in self._sequences.values())
        endings = self.constraints.settle(is_idle)
        return [self._finish(sequence, ending, []) for sequence, ending in endings.items()]

    def _expire(self) -> list[TokenEvent]:
        """End the sequences whose deadline has passed."""
        now_s = self._now()
        late = [s for s in self._sequences.values() if (s.request.deadline_s or now_s) < now_s]
        return [self._finish(sequence, Ending(FinishReason.ERROR, "the deadline has passed"), []) for sequence in late]

    def _finish(self, sequence: Sequence, ending: Ending, token_ids: list[int]) -> TokenEvent:
        self.abort(sequence.request_id)
        return token_event(sequence, token_ids, sequence.metrics(self._now()), ending)

    def _record(self, step: PendingStep, num_sampled: int) -> None:
        stats, now_s = self.stats, time.perf_counter()
        stats.num_steps += 1
        stats.num_prompt_tokens += sum(chunk.num_prompt_tokens for chunk in step.batch.chunks)
        stats.num_generated_tokens += num_sampled
        stats.step_tokens, stats.step_is_decode = num_sampled, not step.batch.prefill
        stats.wait_s = self.runner.wait_s
        if step.num_saturated is not None:
            stats.num_saturated_kv = int(step.num_saturated.wait()[0])
        if self.speculation is not None:
            stats.num_draft_tokens = self.speculation.num_draft_tokens
            stats.num_accepted_tokens = self.speculation.num_accepted_tokens
        # Until the step before had finished, the device was not at work for this one.
        stats.step_bytes, stats.step_s = step.num_bytes, now_s - max(step.launched_s, self._collected_s)
        self._collected_s = now_s
