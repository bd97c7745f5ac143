"""`python -m loadtest.engine_speed`: prefill and decode speed of Nibble's engine on this machine's CPUs, beside others.

The others are transformers (float32 and bfloat16, the same weights dequantised) and, where `llama-cpp-python` is
installed, llama.cpp on the same GGUF file. All are loaded at once, each in its own process, and take turns, so that a
slower minute of the machine hits all of them alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.engines.interface import EngineNotInstalled
from loadtest.engines.process import KINDS, EngineProcess, Task
from loadtest.machine import Machine, StolenTime, this_machine
from nibble.service.demo_model import fetch_demo_model

_PACKAGES = ("numpy", "numba", "torch", "transformers", "llama-cpp-python")


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one engine at one task; of a batch, all its sequences together."""

    engine: str
    task: str
    median_tokens_per_s: float
    best_tokens_per_s: float
    worst_tokens_per_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    stolen_share: float  # see machine.StolenTime: figures of a busy host say little
    model: str
    num_threads: int
    num_rounds: int
    prefill_tokens: int
    decode_tokens: int
    missing: dict[str, str]
    results: list[Measurement]


def tasks(prefill_tokens: int, decode_prompt_tokens: int, decode_tokens: int, seed: int) -> dict[str, Task]:
    """What each engine does in one round. Another seed gives other prompts: no engine may remember them."""

    def decode(batch: int) -> Task:
        return Task(
            kind="decode", num_prompts=batch, prompt_tokens=decode_prompt_tokens, num_tokens=decode_tokens, seed=seed
        )

    return {
        "prefill": Task(kind="prefill", num_prompts=1, prompt_tokens=prefill_tokens, num_tokens=1, seed=seed),
        "decode, batch 1": decode(1),
        "decode, batch 8": decode(8),
    }


def tokens_of(task: Task) -> int:
    return task.prompt_tokens if task.kind == "prefill" else task.num_prompts * task.num_tokens


def measure(options: argparse.Namespace, gguf: Path, console: Console) -> Report:
    machine, stolen = this_machine(_PACKAGES), StolenTime()
    engines, missing = _load(options, gguf, console)
    speeds: dict[tuple[str, str], list[float]] = {}
    try:
        for round_index in range(options.rounds + 1):
            round_tasks = tasks(
                options.prefill_tokens, options.decode_prompt_tokens, options.decode_tokens, seed=round_index
            )
            for task_name, task in round_tasks.items():
                for engine_name, engine in engines.items():
                    seconds = engine.run(task)
                    if round_index > 0:  # the first round warms up
                        speeds.setdefault((engine_name, task_name), []).append(tokens_of(task) / seconds)
            console.print(f"round {round_index} of {options.rounds}" + (" (warm-up)" if round_index == 0 else ""))
    finally:
        for engine in engines.values():
            engine.close()
    return Report(
        machine=machine,
        stolen_share=stolen.share(),
        model=gguf.name,
        num_threads=options.threads,
        num_rounds=options.rounds,
        prefill_tokens=options.prefill_tokens,
        decode_tokens=options.decode_tokens,
        missing=missing,
        results=[_summary(engine, task, values) for (engine, task), values in speeds.items()],
    )


def _load(options: argparse.Namespace, gguf: Path, console: Console) -> tuple[dict[str, EngineProcess], dict[str, str]]:
    engines, missing = {}, {}
    for kind in options.engines:
        console.print(f"loading {kind}")
        try:
            engines[kind] = EngineProcess(kind, gguf, options.cache_dir, options.threads)
        except EngineNotInstalled as error:
            missing[kind] = str(error)
            console.print(f"{kind}: not installed ({error})")
    return engines, missing


def _summary(engine: str, task: str, values: list[float]) -> Measurement:
    return Measurement(
        engine=engine,
        task=task,
        median_tokens_per_s=round(statistics.median(values), 1),
        best_tokens_per_s=round(max(values), 1),
        worst_tokens_per_s=round(min(values), 1),
    )


def print_table(report: Report, console: Console) -> None:
    machine = report.machine
    console.print(
        f"{report.model}, {report.num_threads} threads of {machine.cpu}, "
        f"{report.stolen_share:.0%} of the CPU time taken by other machines of the host"
    )
    table = Table("engine", title=f"tokens/s, median of {report.num_rounds}")
    task_names = list(dict.fromkeys(result.task for result in report.results))
    for name in task_names:
        table.add_column(name, justify="right")
    by_engine: dict[str, dict[str, Measurement]] = {}
    for result in report.results:
        by_engine.setdefault(result.engine, {})[result.task] = result
    for engine, results in by_engine.items():
        cells = [f"{results[name].median_tokens_per_s:.1f}" for name in task_names]
        table.add_row(engine, *cells)
    for engine in report.missing:
        table.add_row(engine, *["not installed"] * len(task_names))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file [the demo model]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--decode-prompt-tokens", type=int, default=64)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--engines", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "nibble")
    parser.add_argument("--json", type=Path, default=None, help="also write the report there; - for stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    gguf = options.model or fetch_demo_model(options.cache_dir, lambda *_: None)
    report = measure(options, gguf, console)
    print_table(report, console)
    if options.json is not None:
        text = msgspec.json.format(msgspec.json.encode(report)).decode() + "\n"
        sys.stdout.write(text) if str(options.json) == "-" else options.json.write_text(text)


if __name__ == "__main__":
    main()
