"""The engine under the workloads of `loadtest.scheduling`: their sizes, how they are run, and what is measured."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtest.gpu_engine import make_kernels
from loadtest.random_model import SHAPES, RandomCheckpoint
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import KVLayout
from nibble.service.demo_model import fetch_demo_model


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, and numbers of requests."""

    system_tokens: int
    question_tokens: int
    answer_tokens: int
    num_questions: int
    num_turns: int
    num_at_once: int
    num_streams: int
    long_tokens: int
    num_long: int
    budgets: tuple[int, ...]
    num_storm: int
    storm_prompt_tokens: int
    storm_output_tokens: int


CPU_SIZES = Sizes(
    system_tokens=1000,
    question_tokens=40,
    answer_tokens=24,
    num_questions=16,
    num_turns=5,
    num_at_once=4,
    num_streams=4,
    long_tokens=2048,
    num_long=3,
    budgets=(64, 128, 256, 512, 2048 + 4),
    num_storm=12,
    storm_prompt_tokens=150,
    storm_output_tokens=200,
)
GPU_SIZES = Sizes(
    system_tokens=4000,
    question_tokens=100,
    answer_tokens=64,
    num_questions=128,
    num_turns=8,
    num_at_once=32,
    num_streams=32,
    long_tokens=8000,
    num_long=8,
    budgets=(512, 1024, 2048, 8000 + 32),
    num_storm=96,
    storm_prompt_tokens=500,
    storm_output_tokens=500,
)


class Prefix(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    has_cache: bool
    seconds: float
    first_token_p50_ms: float
    computed_prompt_tokens: int
    hit_share: float  # of all prompt tokens


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """budget 0: nobody else is there."""

    budget: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    long_first_token_s: float


class Storm(msgspec.Struct, frozen=True, kw_only=True):
    kv_share: float  # of what all requests need together
    has_cache: bool
    seconds: float
    num_preemptions: int
    computed_prompt_tokens: int
    is_same_text: bool


@dataclass
class Run:
    """One engine; when each request was added and got its tokens."""

    engine: LLMEngine
    added_s: dict[str, float] = field(default_factory=dict)
    times_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.added_s[name], self.times_s[name], self.tokens[name] = time.perf_counter(), [], []
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        arrival_s = float(len(self.added_s))
        self.engine.add(
            GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, arrival_s=arrival_s)
        )

    def step(self) -> list[str]:
        """Who ended."""
        events = self.engine.step()
        now_s = time.perf_counter()
        for event in events:
            self.tokens[event.request_id] += event.token_ids
            self.times_s[event.request_id] += [now_s] * len(event.token_ids)
        return [event.request_id for event in events if event.finish_reason is not None]

    def finish(self) -> None:
        while self.engine.has_unfinished:
            self.step()

    def first_token_s(self) -> list[float]:
        return [self.times_s[name][0] - added_s for name, added_s in self.added_s.items()]


class Bench:
    """Makes engines of one model; prompts are random tokens."""

    def __init__(self, device: str) -> None:
        self.kernels: Kernels = make_kernels(device)
        self.sizes = CPU_SIZES if device == "cpu" else GPU_SIZES
        if device == "cpu":
            cache_dir = Path.home() / ".cache" / "nibble"
            directory = resolve_checkpoint(fetch_demo_model(cache_dir, lambda *_: None), cache_dir, lambda *_: None)
            self._checkpoint: Any = load_checkpoint(directory)
        else:
            self._checkpoint = RandomCheckpoint(SHAPES["llama-3-8b"])
        self.kernels.warm_up()

    def run(self, num_blocks: int, budget: int, num_sequences: int, has_cache: bool = True) -> Run:
        config = self._checkpoint.config
        gc.collect()  # the engine before
        block_bytes = config.num_layers * KVLayout(config.num_kv_heads, config.head_dim).block_bytes
        limits = EngineLimits(
            kv_cache_bytes=(num_blocks + 1) * block_bytes,
            max_num_sequences=num_sequences,
            max_num_batched_tokens=budget,
            has_prefix_cache=has_cache,
        )
        run = Run(LLMEngine.load(self._checkpoint, self.kernels, limits))
        run.add("warm up", [1] * 100, 3)
        run.finish()
        return Run(run.engine)

    def prompt(self, seed: int, num_tokens: int) -> list[int]:
        tokens: list[int] = (
            np.random.default_rng(seed).integers(10, self._checkpoint.config.vocab_size, num_tokens).tolist()
        )
        return tokens

    def questions(self, has_cache: bool) -> Prefix:
        sizes = self.sizes
        system = self.prompt(0, sizes.system_tokens)
        prompts = [system + self.prompt(1 + i, sizes.question_tokens) for i in range(sizes.num_questions)]
        num_blocks = 2 * sizes.num_at_once * num_blocks_for(len(prompts[0]) + sizes.answer_tokens)
        run = self.run(num_blocks, 512, sizes.num_at_once, has_cache)
        start_s, before = time.perf_counter(), run.engine.stats.num_prompt_tokens
        num_running = 0
        for i, prompt in enumerate(prompts):
            run.add(str(i), prompt, sizes.answer_tokens)
            num_running += 1
            while num_running == sizes.num_at_once:
                num_running -= len(run.step())
        run.finish()
        return self._prefix("questions", has_cache, run, time.perf_counter() - start_s, before)

    def conversations(self, has_cache: bool) -> Prefix:
        sizes = self.sizes
        prompts = [self.prompt(100 + i, sizes.question_tokens * 4) for i in range(sizes.num_at_once)]
        per_turn = sizes.answer_tokens * 4 + sizes.question_tokens
        longest = sizes.question_tokens * 4 + sizes.num_turns * per_turn
        run = self.run(2 * sizes.num_at_once * num_blocks_for(longest), 512, sizes.num_at_once, has_cache)
        start_s, before = time.perf_counter(), run.engine.stats.num_prompt_tokens
        for turn in range(sizes.num_turns):
            for i, prompt in enumerate(prompts):
                run.add(f"{turn}.{i}", list(prompt), sizes.answer_tokens * 4)
            run.finish()
            for i, prompt in enumerate(prompts):
                prompt += run.tokens[f"{turn}.{i}"] + self.prompt(1000 * turn + i, sizes.question_tokens)
        return self._prefix("conversations", has_cache, run, time.perf_counter() - start_s, before)

    def _prefix(self, workload: str, has_cache: bool, run: Run, seconds: float, before: int) -> Prefix:
        stats = run.engine.stats
        return Prefix(
            workload=workload,
            has_cache=has_cache,
            seconds=seconds,
            first_token_p50_ms=float(np.median(run.first_token_s())) * 1e3,
            computed_prompt_tokens=stats.num_prompt_tokens - before,
            hit_share=stats.num_cache_hits / stats.num_cache_queries,
        )

    def latency(self, budget: int) -> Latency:
        """The streams' gaps from the first long prompt's arrival to the last one's first token."""
        sizes = self.sizes
        has_long = budget > 0
        num_sequences = sizes.num_streams + 1
        num_blocks = num_sequences * num_blocks_for(sizes.long_tokens + 2048)
        run = self.run(num_blocks, budget or sizes.budgets[-2], num_sequences, has_cache=False)
        streams = [f"stream {i}" for i in range(sizes.num_streams)]
        for i, name in enumerate(streams):
            run.add(name, self.prompt(i, 64), 2000)
        while not all(len(run.times_s[name]) > 3 for name in streams):
            run.step()
        start_s = time.perf_counter()
        long_s = []
        for i in range(sizes.num_long if has_long else 0):
            run.add(f"long {i}", self.prompt(50 + i, sizes.long_tokens), 1)
            while not run.times_s[f"long {i}"]:
                run.step()
            long_s.append(run.times_s[f"long {i}"][0] - run.added_s[f"long {i}"])
        for _ in range(0 if has_long else 100):
            run.step()
        gaps = np.concatenate([np.diff([t for t in run.times_s[name] if t >= start_s]) for name in streams]) * 1e3
        return Latency(
            budget=budget,
            gap_p50_ms=float(np.median(gaps)),
            gap_p99_ms=float(np.percentile(gaps, 99)),
            gap_max_ms=float(gaps.max()),
            long_first_token_s=float(np.median(long_s)) if long_s else 0.0,
        )

    def storm(self) -> list[Storm]:
        sizes = self.sizes
        needed = sizes.num_storm * num_blocks_for(sizes.storm_prompt_tokens + sizes.storm_output_tokens)
        results, texts = [], []
        for share, has_cache in ((1.0, True), (1 / 3, True), (1 / 3, False)):
            run = self.run(int(needed * share), 512, sizes.num_storm, has_cache)
            start_s, before = time.perf_counter(), run.engine.stats.num_prompt_tokens
            for i in range(sizes.num_storm):
                run.add(str(i), self.prompt(i, sizes.storm_prompt_tokens), sizes.storm_output_tokens)
            run.finish()
            texts.append(run.tokens)
            results.append(
                Storm(
                    kv_share=share,
                    has_cache=has_cache,
                    seconds=time.perf_counter() - start_s,
                    num_preemptions=run.engine.stats.num_preemptions,
                    computed_prompt_tokens=run.engine.stats.num_prompt_tokens - before,
                    is_same_text=run.tokens == texts[0],
                )
            )
        return results
