"""What `gpu_engine` measures, and how: requests with random prompts, timed around `LLMEngine.step`."""

from __future__ import annotations

import statistics
import time

import msgspec
import numpy as np

from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence

DECODE_STEPS = 24
WARM_UP_STEPS = 4
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    input_tokens: int
    output_tokens: int
    seconds: float
    prefill_tokens_per_s: float
    output_tokens_per_s: float
    decode_tokens_per_s: float | None


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    tokens: int
    seconds: float
    tokens_per_s: float


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    context: int
    step_us: float
    tokens_per_s: float
    bandwidth_share: float  # of the measured read bandwidth, by the bytes that must be read


class Bench:
    """One engine and the requests that it is given."""

    def __init__(self, engine: LLMEngine, seed: int = 0) -> None:
        self.engine = engine
        self._rng = np.random.default_rng(seed)
        self._num_requests = 0

    def add(self, num_prompt_tokens: int, max_tokens: int, sampling: SamplingParams = GREEDY) -> str:
        """sampling: whose max_tokens does not count."""
        self._num_requests += 1
        prompt = self._rng.integers(0, self.engine.config.vocab_size, num_prompt_tokens).tolist()
        self.engine.add(
            GenerationRequest(
                request_id=f"{self._num_requests:08d}",
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(sampling, max_tokens=max_tokens),
                arrival_s=float(self._num_requests),
            )
        )
        return f"{self._num_requests:08d}"

    def fits(self, batch: int, context: int) -> bool:
        engine = self.engine
        return (
            batch <= engine.scheduler.max_num_sequences
            and context < engine.max_context_tokens
            and batch * (context + 64) <= engine.kv_cache_tokens
        )

    def workload(self, batch: int, input_tokens: int, output_tokens: int) -> Workload:
        start_s = time.perf_counter()
        running = {self.add(input_tokens, output_tokens) for _ in range(batch)}
        started: set[str] = set()
        is_full_since_s, is_full_until_s, num_decoded = 0.0, 0.0, 0
        while self.engine.has_unfinished:
            events = self.engine.step()
            now_s = time.perf_counter()
            if len(started) == batch == len(running):
                num_decoded += len(events)
                is_full_until_s = now_s
            elif len(started) < batch:
                started.update(event.request_id for event in events)
                is_full_since_s = now_s
            running -= {event.request_id for event in events if event.finish_reason}
        seconds = time.perf_counter() - start_s
        return Workload(
            batch=batch,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seconds=seconds,
            prefill_tokens_per_s=batch * input_tokens / (is_full_since_s - start_s),
            output_tokens_per_s=batch * output_tokens / seconds,
            decode_tokens_per_s=num_decoded / (is_full_until_s - is_full_since_s) if num_decoded else None,
        )

    def prefill(self, tokens: int) -> Prefill:
        start_s = time.perf_counter()
        self.add(tokens, 1)
        while self.engine.has_unfinished:
            self.engine.step()
        seconds = time.perf_counter() - start_s
        return Prefill(tokens=tokens, seconds=seconds, tokens_per_s=tokens / seconds)

    def decode(self, batch: int, context: int, read_bandwidth: float) -> Decode:
        ids = self.start_decoding(batch, context, WARM_UP_STEPS + DECODE_STEPS + 8)
        times = []
        for _ in range(WARM_UP_STEPS + DECODE_STEPS):
            self.engine.step()
            times.append(time.perf_counter())
        step_bytes = self.engine.stats.step_bytes
        self.abort(ids)
        step_s = float(statistics.median(np.diff(times[WARM_UP_STEPS - 1 :])))
        return Decode(
            batch=batch,
            context=context,
            step_us=step_s * 1e6,
            tokens_per_s=batch / step_s,
            bandwidth_share=step_bytes / step_s / read_bandwidth,
        )

    def start_decoding(self, batch: int, context: int, max_tokens: int, sampling: SamplingParams = GREEDY) -> list[str]:
        """Requests whose prompts of context - 1 tokens count as computed."""
        ids = [self.add(context - 1, max_tokens, sampling) for _ in range(batch)]
        for sequence in list(self.engine.scheduler.waiting):
            self._pretend_prefilled(sequence)
        return ids

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)
        self.engine.step()

    def _pretend_prefilled(self, sequence: Sequence) -> None:
        """Its prompt counts as computed, and one token as generated."""
        scheduler = self.engine.scheduler
        scheduler.waiting.remove(sequence)
        scheduler.block_manager.grow(sequence.block_table, sequence.num_tokens + 1)
        scheduler.running.append(sequence)
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        sequence.token_ids.append(0)
