"""The engine under the workloads of `loadtest.scheduling`: how they are run, and what is measured."""

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
from loadtest.scheduling_sizes import CPU_SIZES, GPU_SIZES
from nibble.engine.block_manager import num_blocks_for
from nibble.engine.checkpoint.native import load_checkpoint
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.memory_plan import make_runners
from nibble.engine.model import DecoderModel
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.interface import Kernels
from nibble.kernels.layout import KVLayout
from nibble.service.demo_model import fetch_demo_model

SWAP_BYTES = 1 << 30
MAX_GAPS = 16  # looked at: each computes a text anew


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
    """num_different: texts, from the first case's. gaps: where some of them first differ, by how much the logit of the
    best token is above the next one's, sorted."""

    kv_share: float  # of what all requests need together
    has_cache: bool
    budget: int
    seconds: float
    num_preemptions: int
    num_restored: int  # of the preempted, from the host's memory
    computed_prompt_tokens: int
    num_different: int
    gaps: list[float]


@dataclass
class Run:
    """One engine; when each request was added and got its tokens."""

    engine: LLMEngine
    added_s: dict[str, float] = field(default_factory=dict)
    times_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        """Greedy."""
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

    def logit_gap(self, prompt: list[int], generated: list[int]) -> float:
        """Of the two most probable tokens after these."""
        sampling = SamplingParams(max_tokens=len(generated) + 1, temperature=0.0, logprobs=2)
        request = GenerationRequest(request_id="gap", prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0)
        self.engine.add(request, generated)
        while not (events := self.engine.step()):
            pass
        (event,) = events
        assert event.logprobs is not None, "log probabilities were asked for"
        _, _, best, _, second = np.frombuffer(event.logprobs, "<f4").tolist()
        return float(best - second)

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
        config = self._checkpoint.config
        self._layout = KVLayout(config.num_kv_heads, config.head_dim)
        self._model = DecoderModel(config, self.kernels, self._checkpoint, self._layout)

    def run(self, num_blocks: int, budget: int, num_sequences: int, has_cache: bool = True, swap_bytes: int = 0) -> Run:
        config = self._checkpoint.config
        gc.collect()  # the engine before
        block_bytes = config.num_layers * self._layout.block_bytes
        limits = EngineLimits(
            kv_cache_bytes=(num_blocks + 1) * block_bytes,
            max_num_sequences=num_sequences,
            max_num_batched_tokens=budget,
            has_prefix_cache=has_cache,
            swap_bytes=swap_bytes,
        )
        (runner,) = make_runners(self.kernels, [self._model], limits)
        run = Run(LLMEngine(runner, config, limits))
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
        run = self.run(num_blocks, sizes.prefix_budget, sizes.num_at_once, has_cache)
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
        num_blocks = 2 * sizes.num_at_once * num_blocks_for(longest)
        run = self.run(num_blocks, sizes.prefix_budget, sizes.num_at_once, has_cache)
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
        """The streams' gaps from the last token before the first long prompt to the last one's first token, after one
        that is not counted: products of a new shape may load kernels."""
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
        if has_long:
            self._first_token_s(run, "warm up", self.prompt(49, sizes.long_tokens))
        before = {name: len(run.times_s[name]) - 1 for name in streams}
        prompts = [self.prompt(50 + i, sizes.long_tokens) for i in range(sizes.num_long if has_long else 0)]
        long_s = [self._first_token_s(run, f"long {i}", prompt) for i, prompt in enumerate(prompts)]
        for _ in range(0 if has_long else 100):
            run.step()
        gaps = np.concatenate([np.diff(run.times_s[name][before[name] :]) for name in streams]) * 1e3
        return Latency(
            budget=budget,
            gap_p50_ms=float(np.median(gaps)),
            gap_p99_ms=float(np.percentile(gaps, 99)),
            gap_max_ms=float(gaps.max()),
            long_first_token_s=float(np.median(long_s)) if long_s else 0.0,
        )

    def _first_token_s(self, run: Run, name: str, prompt: list[int]) -> float:
        """How long a request alone takes to it, among the others."""
        run.add(name, prompt, 1)
        while not run.times_s[name]:
            run.step()
        return run.times_s[name][0] - run.added_s[name]

    def storm(self) -> list[Storm]:
        """The second case has all blocks too: what differs there, prompts cut into other chunks do."""
        first, expected = self._storm(1.0, True, 512)
        cases = [(1.0, True, 384), (1 / 3, True, 512), (1 / 3, False, 512)]
        results = [first, *(self._storm(*case, expected=expected)[0] for case in cases)]
        if self.kernels.is_asynchronous:
            results.append(self._storm(1 / 3, True, 512, SWAP_BYTES, expected)[0])
        return results

    def _storm(
        self,
        share: float,
        has_cache: bool,
        budget: int,
        swap_bytes: int = 0,
        expected: dict[str, list[int]] | None = None,
    ) -> tuple[Storm, dict[str, list[int]]]:
        """expected: the texts; None: whatever they are."""
        sizes = self.sizes
        needed = sizes.num_storm * num_blocks_for(sizes.storm_prompt_tokens + sizes.storm_output_tokens)
        run = self.run(int(needed * share), budget, sizes.num_storm, has_cache, swap_bytes)
        start_s, before = time.perf_counter(), run.engine.stats.num_prompt_tokens
        for i in range(sizes.num_storm):
            run.add(str(i), self.prompt(i, sizes.storm_prompt_tokens), sizes.storm_output_tokens)
        run.finish()
        seconds, stats = time.perf_counter() - start_s, run.engine.stats
        result = Storm(
            kv_share=share,
            has_cache=has_cache,
            budget=budget,
            seconds=seconds,
            num_preemptions=stats.num_preemptions,
            num_restored=run.engine.scheduler.swap_space.num_restored,
            computed_prompt_tokens=stats.num_prompt_tokens - before,
            num_different=sum(tokens != (expected or run.tokens)[name] for name, tokens in run.tokens.items()),
            gaps=self._gaps(run, expected or run.tokens),
        )
        return result, run.tokens

    def _gaps(self, run: Run, expected: dict[str, list[int]]) -> list[float]:
        gaps: list[float] = []
        for name, tokens in run.tokens.items():
            if len(gaps) == MAX_GAPS:
                break
            pairs = enumerate(zip(tokens, expected[name], strict=True))
            index = next((i for i, (token, other) in pairs if token != other), None)
            if index is not None:
                gaps.append(run.logit_gap(self.prompt(int(name), self.sizes.storm_prompt_tokens), tokens[:index]))
        return sorted(gaps)
