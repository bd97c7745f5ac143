"""`python -m loadtest.gpu_engine`: speed of the engine on this machine's GPU, with random weights of a model's shape.

Everything goes through `LLMEngine.step`, in this process: scheduler, uploads, graphs, sampling and reading the ids are
all in the numbers; gateway and broker are not. Greedy, INT8 KV cache. Three kinds of measurement:

    workload    B prompts of I tokens, O tokens each, all added at once. `decode_tokens_per_s` counts the steps in which
                all of them decode; `output_tokens_per_s` is the whole run's, prefill included.
    prefill     one prompt, from `add` to its first token.
    decode      the median step of B sequences at a context of C tokens. Their keys and values are not computed but
                whatever is in their blocks: it is the same work.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from loadtest.machine import Machine, this_machine
from loadtest.random_model import SHAPES, RandomCheckpoint
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Kernels

WORKLOADS = (  # batch, input tokens, output tokens; those of the table in the design document, and two larger ones
    (1, 128, 256),
    (1, 2048, 128),
    (8, 512, 128),
    (32, 512, 128),
    (64, 512, 128),
    (128, 512, 128),
    (256, 512, 128),
    (32, 4096, 128),
    (16, 2048, 1),
)
PREFILLS = (512, 2048, 8192)
DECODE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DECODE_CONTEXTS = (1024, 4096)
DECODE_STEPS = 24
WARM_UP_STEPS = 4
_PACKAGES = ("numpy", "cupy-cuda13x", "cuda-bindings", "nvidia-cuda-nvrtc")


class GPU(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    driver: str
    memory_mib: int
    read_bandwidth: float  # bytes per second, measured


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds since the process began until ..."""

    imported_s: float
    engine_ready_s: float
    first_token_s: float


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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Medians. What does not fit into the KV cache is left out."""

    machine: Machine
    gpu: GPU | None
    device: str
    model: str
    kv_cache_tokens: int
    start: Start
    workloads: list[Workload]
    prefill: list[Prefill]
    decode: list[Decode]


class Bench:
    """One engine and the requests that it is given."""

    def __init__(self, engine: LLMEngine, seed: int = 0) -> None:
        self.engine = engine
        self._rng = np.random.default_rng(seed)
        self._num_requests = 0

    def add(self, num_prompt_tokens: int, max_tokens: int) -> str:
        self._num_requests += 1
        prompt = self._rng.integers(0, self.engine.config.vocab_size, num_prompt_tokens).tolist()
        self.engine.add(
            GenerationRequest(
                request_id=f"{self._num_requests:08d}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
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
        ids = [self.add(context - 1, WARM_UP_STEPS + DECODE_STEPS + 8) for _ in range(batch)]
        for sequence in list(self.engine.scheduler.waiting):
            self._pretend_prefilled(sequence)
        times = []
        for _ in range(WARM_UP_STEPS + DECODE_STEPS):
            self.engine.step()
            times.append(time.perf_counter())
        step_bytes = self.engine.stats.step_bytes
        for request_id in ids:
            self.engine.abort(request_id)
        self.engine.step()
        step_s = float(statistics.median(np.diff(times[WARM_UP_STEPS - 1 :])))
        return Decode(
            batch=batch,
            context=context,
            step_us=step_s * 1e6,
            tokens_per_s=batch / step_s,
            bandwidth_share=step_bytes / step_s / read_bandwidth,
        )

    def _pretend_prefilled(self, sequence: Sequence) -> None:
        """Its prompt counts as computed, and one token as generated."""
        scheduler = self.engine.scheduler
        scheduler.waiting.remove(sequence)
        scheduler.block_manager.grow(sequence.block_table, sequence.num_tokens + 1)
        scheduler.running.append(sequence)
        sequence.num_computed_tokens = sequence.num_prompt_tokens
        sequence.token_ids.append(0)


def median_of(rounds: int, measure: Callable[[], Any]) -> Any:
    """The round of median length, of a measurement with `seconds`."""
    results = sorted((measure() for _ in range(rounds)), key=lambda result: result.seconds)
    return results[len(results) // 2]


def make_kernels(device: str) -> Kernels:
    if device == "cpu":
        from nibble.kernels.cpu.backend import CPUKernels

        return CPUKernels()
    from nibble.kernels.cuda.backend import CUDAKernels

    return CUDAKernels()


def measure(options: argparse.Namespace, console: Console) -> Report:
    began_s = process_start_s()
    imported_s = time.time() - began_s
    kernels = make_kernels(options.device)
    limits = EngineLimits(
        kv_cache_bytes=(2 << 30) if options.device == "cpu" else None,
        max_num_sequences=options.max_num_sequences,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    bench = Bench(LLMEngine.load(RandomCheckpoint(SHAPES[options.model]), kernels, limits))
    engine_ready_s = time.time() - began_s
    bench.prefill(16)
    start = Start(imported_s=imported_s, engine_ready_s=engine_ready_s, first_token_s=time.time() - began_s)
    console.print(start)
    read_bandwidth = kernels.read_bandwidth()
    return Report(
        machine=this_machine(_PACKAGES),
        gpu=this_gpu(read_bandwidth) if options.device == "cuda" else None,
        device=kernels.device_name,
        model=options.model,
        kv_cache_tokens=bench.engine.kv_cache_tokens,
        start=start,
        workloads=list(_workloads(bench, options, console)),
        prefill=list(_prefills(bench, options, console)),
        decode=list(_decodes(bench, options, read_bandwidth, console)),
    )


def _workloads(bench: Bench, options: argparse.Namespace, console: Console) -> Iterator[Workload]:
    for batch, input_tokens, output_tokens in WORKLOADS if "workload" in options.kinds else ():
        if batch <= options.max_batch and bench.fits(batch, input_tokens + output_tokens):
            shape = (batch, input_tokens, output_tokens)
            result = median_of(options.rounds, partial(bench.workload, *shape))
            console.print(result)
            yield result


def _prefills(bench: Bench, options: argparse.Namespace, console: Console) -> Iterator[Prefill]:
    for tokens in PREFILLS if "prefill" in options.kinds else ():
        tokens = min(tokens, bench.engine.max_context_tokens - 1)
        if bench.fits(1, tokens):
            result = median_of(2 * options.rounds + 1, partial(bench.prefill, tokens))
            console.print(result)
            yield result


def _decodes(bench: Bench, options: argparse.Namespace, read_bandwidth: float, console: Console) -> Iterator[Decode]:
    for context in DECODE_CONTEXTS if "decode" in options.kinds else ():
        for batch in DECODE_BATCHES:
            if batch <= options.max_batch and bench.fits(batch, context):
                result = bench.decode(batch, context, read_bandwidth)
                console.print(result)
                yield result


def this_gpu(read_bandwidth: float) -> GPU:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    output = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    name, driver, memory = (field.strip() for field in (output.strip() or "unknown,unknown,0").split(","))
    return GPU(name=name, driver=driver, memory_mib=int(memory), read_bandwidth=read_bandwidth)


def process_start_s() -> float:
    """Unix time at which this process began, from /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / 100  # USER_HZ is 100 on every Linux


def print_tables(report: Report, console: Console) -> None:
    console.print(f"{report.model} on {report.device}, {report.kv_cache_tokens} tokens of KV cache")
    table = Table("batch: in/out", "prefill tok/s", "output tok/s", "decode tok/s", title="workloads")
    for w in report.workloads:
        decode = f"{w.decode_tokens_per_s:.0f}" if w.decode_tokens_per_s else "-"
        table.add_row(
            f"{w.batch}: {w.input_tokens}/{w.output_tokens}",
            f"{w.prefill_tokens_per_s:.0f}",
            f"{w.output_tokens_per_s:.0f}",
            decode,
        )
    console.print(table)
    table = Table("batch", "context", "us per step", "tok/s", "of bandwidth", title="decode steps")
    for d in report.decode:
        share = f"{d.bandwidth_share:.0%}"
        table.add_row(str(d.batch), str(d.context), f"{d.step_us:.0f}", f"{d.tokens_per_s:.0f}", share)
    console.print(table)
    for p in report.prefill:
        console.print(f"prefill of {p.tokens}: {p.seconds * 1e3:.1f} ms, {p.tokens_per_s:.0f} tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=("workload", "prefill", "decode"))
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-num-sequences", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=1, help="of each workload; prefill: twice that and one")
    parser.add_argument("--json", type=Path, default=None, help="also write the report there; - for stdout")
    parser.set_defaults(kinds=("workload", "prefill", "decode"))
    options = parser.parse_args()
    console = Console(stderr=True, width=140)
    report = measure(options, console)
    print_tables(report, console)
    if options.json is not None:
        text = msgspec.json.format(msgspec.json.encode(report)).decode() + "\n"
        sys.stdout.write(text) if str(options.json) == "-" else options.json.write_text(text)


if __name__ == "__main__":
    main()
