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
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.gpu import GPU, PACKAGES, this_gpu
from loadtest.gpu_report import EngineSpeed
from loadtest.machine import Machine, this_machine
from loadtest.random_model import SHAPES, RandomCheckpoint
from loadtest.step_timing import Bench, Decode, Prefill, Workload
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.kernels.interface import Kernels

WORKLOADS = (  # batch, input tokens, output tokens
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


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: GPU | None
    device: str
    engine: EngineSpeed


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
    machine = this_machine(PACKAGES)
    kernels = make_kernels(options.device)
    limits = EngineLimits(
        kv_cache_bytes=(2 << 30) if options.device == "cpu" else None,
        max_num_sequences=options.max_num_sequences,
        max_num_batched_tokens=options.max_num_batched_tokens,
    )
    bench = Bench(LLMEngine.load(RandomCheckpoint(SHAPES[options.model]), kernels, limits))
    bench.prefill(16)
    read_bandwidth = kernels.read_bandwidth()
    engine = EngineSpeed(
        model=options.model,
        kv_cache_tokens=bench.engine.kv_cache_tokens,
        workloads=list(_workloads(bench, options, console)),
        prefill=list(_prefills(bench, options, console)),
        decode=list(_decodes(bench, options, read_bandwidth, console)),
    )
    gpu = this_gpu(read_bandwidth) if options.device == "cuda" else None
    return Report(machine=machine, gpu=gpu, device=kernels.device_name, engine=engine)


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


def print_tables(report: Report, console: Console) -> None:
    engine = report.engine
    console.print(f"{engine.model} on {report.device}, {engine.kv_cache_tokens} tokens of KV cache")
    table = Table("batch: in/out", "prefill tok/s", "output tok/s", "decode tok/s", title="workloads")
    for w in engine.workloads:
        decode = f"{w.decode_tokens_per_s:.0f}" if w.decode_tokens_per_s else "-"
        table.add_row(
            f"{w.batch}: {w.input_tokens}/{w.output_tokens}",
            f"{w.prefill_tokens_per_s:.0f}",
            f"{w.output_tokens_per_s:.0f}",
            decode,
        )
    console.print(table)
    table = Table("batch", "context", "us per step", "tok/s", "of bandwidth", title="decode steps")
    for d in engine.decode:
        share = f"{d.bandwidth_share:.0%}"
        table.add_row(str(d.batch), str(d.context), f"{d.step_us:.0f}", f"{d.tokens_per_s:.0f}", share)
    console.print(table)
    for p in engine.prefill:
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
