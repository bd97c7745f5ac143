"""Nibble's engine in this process, as the worker drives it."""

from __future__ import annotations

import time
from pathlib import Path

from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.cpu.backend import CPUKernels

_KV_CACHE_BYTES = 512 << 20


class NibbleEngine:
    """See SpeedEngine. Prompts must differ from call to call, or the prefix cache answers."""

    def __init__(self, gguf: Path, cache_dir: Path, num_threads: int) -> None:
        directory = resolve_checkpoint(gguf, cache_dir, lambda *_: None)
        kernels = CPUKernels(num_threads)
        kernels.warm_up()
        self._engine = LLMEngine.from_checkpoint(directory, kernels, EngineLimits(_KV_CACHE_BYTES))
        self._num_requests = 0
        self.vocab_size = self._engine.config.vocab_size

    def prefill(self, prompt: list[int]) -> float:
        self._add(prompt, max_tokens=1)
        start_s = time.perf_counter()
        while self._engine.has_unfinished:
            self._engine.step()
        return time.perf_counter() - start_s

    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        for prompt in prompts:
            self._add(prompt, max_tokens=num_tokens + 1)
        started: set[str] = set()
        while len(started) < len(prompts):
            started.update(event.request_id for event in self._engine.step())
        # Sequences whose prompts were computed first are ahead; the whole batch is timed to the last one's end.
        before = self._engine.stats.num_generated_tokens
        start_s = time.perf_counter()
        while self._engine.has_unfinished:
            self._engine.step()
        seconds = time.perf_counter() - start_s
        return seconds * len(prompts) * num_tokens / (self._engine.stats.num_generated_tokens - before)

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._engine.add(
            GenerationRequest(
                request_id=str(self._num_requests), prompt_token_ids=prompt, sampling=sampling, arrival_s=time.time()
            )
        )
