"""`python -m loadtest.scheduling`: what the scheduler and the prefix cache do for requests, through `LLMEngine.step`.

    prefix      requests with a common system prompt, and conversations whose turns repeat all before, a few at a time,
                with the prefix cache and without
    latency     gaps between the tokens of decoding streams while long prompts arrive, one after the other, for several
                budgets of a step; the largest holds a whole prompt, which is what an engine without chunks does
    storm       requests whose KV blocks are a third of what all need, against enough of them: all must end, with the
                same greedy tokens. Where they are not (products over prompts round by their rows on a GPU): by how much
                the best token's logit was above the next one's

On a CPU the demo model, on a GPU random weights of Llama-3-8B's shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console

from loadtest.gpu import GPU, PACKAGES, this_gpu
from loadtest.machine import Machine, StolenTime, this_machine
from loadtest.scheduling_cases import Bench, Latency, Prefix, Storm
from loadtest.scheduling_sizes import Sizes

_PACKAGES = (*PACKAGES, "numba")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: GPU | None
    device: str
    stolen_share: float
    sizes: Sizes
    prefix: list[Prefix]
    latency: list[Latency]
    storm: list[Storm]


def median_of(rounds: list[list[Any]], value: Callable[[Any], float]) -> list[Any]:
    """Of each case the round with the median value."""
    return [sorted(case, key=value)[len(case) // 2] for case in zip(*rounds, strict=True)]


def measure(options: argparse.Namespace, console: Console) -> Report:
    machine, stolen = this_machine(_PACKAGES), StolenTime()
    bench = Bench(options.device)
    prefix: list[list[Any]] = []
    latency: list[list[Any]] = []
    storm: list[list[Any]] = []
    for _ in range(options.rounds):
        if "prefix" in options.kinds:
            prefix.append([kind(cache) for kind in (bench.questions, bench.conversations) for cache in (True, False)])
        if "latency" in options.kinds:
            latency.append([bench.latency(budget) for budget in (0, *bench.sizes.budgets)])
        if "storm" in options.kinds:
            storm.append(bench.storm())
        for rounds in (prefix, latency, storm):
            console.print(*(rounds[-1] if rounds else []), sep="\n")
    return Report(
        machine=machine,
        gpu=this_gpu(bench.kernels.read_bandwidth()) if options.device == "cuda" else None,
        device=bench.kernels.device_name,
        stolen_share=stolen.share(),
        sizes=bench.sizes,
        prefix=median_of(prefix, lambda result: result.seconds),
        latency=median_of(latency, lambda result: result.gap_p99_ms),
        storm=median_of(storm, lambda result: result.seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=("prefix", "latency", "storm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(kinds=("prefix", "latency", "storm"))
    options = parser.parse_args()
    report = measure(options, Console(stderr=True, width=160))
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")


if __name__ == "__main__":
    main()
