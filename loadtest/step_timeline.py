"""`python -m loadtest.step_timeline`: what host and device do in each step of the engine, and whether they overlap.

B sequences decode at a context of 1,024 tokens (`step_timing`), with several kinds of sampling parameters; then some
decode while a long prompt is computed beside them, chunk by chunk. The report has the medians of the host's parts and
of the device's time, and the spans of some steps as they were: `step_timeline_svg` draws them. `--device none` has the
host's parts alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.gpu import GPU, PACKAGES, this_gpu
from loadtest.gpu_engine import make_kernels
from loadtest.machine import Machine, this_machine
from loadtest.no_device import NoDevice
from loadtest.random_model import SHAPES, RandomCheckpoint
from loadtest.step_recorder import HOST_PARTS, CUDAClock, Step, StepRecorder
from loadtest.step_timing import GREEDY, Bench
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import SamplingParams

BATCHES = (1, 32, 256)
CONTEXT = 1024
MIXED = ((32, 512), (32, 2048), (224, 1024))  # sequences that decode, tokens of a step
LONG_PROMPT_TOKENS = 8000
WARM_UP_STEPS, STEPS, SHOWN_STEPS = 6, 40, 5
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature, top-p": SamplingParams(max_tokens=1, temperature=0.8, top_p=0.95),
    "penalties, bias, 5 logprobs too": SamplingParams(
        max_tokens=1,
        temperature=0.8,
        top_p=0.95,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias=((7, 1.0),),
        logprobs=5,
    ),
}


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of the steps. budget: tokens of a step in which a prompt is computed too; 0: none is.

    host_us is what the host is busy, without waiting; idle_us how long the device has nothing to do before a step.
    """

    batch: int
    sampling: str
    budget: int
    num_steps: int
    step_us: float
    host_us: float
    host_max_us: float
    parts_us: dict[str, float]
    device_us: float | None
    idle_us: float | None
    shown: list[Step]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    gpu: GPU | None
    device: str
    model: str
    cases: list[Case]


def summary(batch: int, sampling: str, budget: int, steps: list[Step]) -> Case:
    def median_us(seconds: Iterator[float]) -> float | None:
        found = list(seconds)
        return round(statistics.median(found) * 1e6, 1) if found else None

    on_device = [step.device for step in steps if step.device is not None]
    busy = [step.busy_s for step in steps]
    return Case(
        batch=batch,
        sampling=sampling,
        budget=budget,
        num_steps=len(steps),
        step_us=median_us(step.host.seconds for step in steps) or 0.0,
        host_us=median_us(iter(busy)) or 0.0,
        host_max_us=round(max(busy) * 1e6, 1),
        parts_us={name: median_us(step.part_s(name) for step in steps) or 0.0 for name in HOST_PARTS},
        device_us=median_us(span.seconds for span in on_device),
        idle_us=median_us(max(0.0, later.start_s - earlier.end_s) for earlier, later in pairwise(on_device)),
        shown=steps[-SHOWN_STEPS:],
    )


def times(count: int) -> Callable[[], bool]:
    """True that often."""
    left = iter([True] * count)
    return lambda: next(left, False)


def decoding(bench: Bench, recorder: StepRecorder, batch: int, sampling: str) -> Case:
    ids = bench.start_decoding(batch, CONTEXT, WARM_UP_STEPS + STEPS + 2, SAMPLINGS[sampling])
    recorder.steps(times(WARM_UP_STEPS))
    steps = recorder.steps(times(STEPS))
    bench.abort(ids)
    return summary(batch, sampling, 0, steps)


def mixed(bench: Bench, recorder: StepRecorder, batch: int, budget: int) -> Case:
    scheduler = bench.engine.scheduler
    full_budget, scheduler.max_num_batched_tokens = scheduler.max_num_batched_tokens, budget
    ids = bench.start_decoding(batch, CONTEXT, LONG_PROMPT_TOKENS, GREEDY)
    recorder.steps(times(WARM_UP_STEPS))
    ids.append(bench.add(LONG_PROMPT_TOKENS, 1))
    steps = recorder.steps(lambda: any(sequence.is_prefilling for sequence in [*scheduler.waiting, *scheduler.running]))
    bench.abort(ids)
    scheduler.max_num_batched_tokens = full_budget
    return summary(batch, "greedy", budget, steps)


def measure(options: argparse.Namespace, console: Console) -> Report:
    machine = this_machine(PACKAGES)
    kernels = NoDevice() if options.device == "none" else make_kernels(options.device)
    checkpoint = RandomCheckpoint(SHAPES[options.model])
    limits = EngineLimits(None, max(BATCHES), 2048)
    bench = Bench(LLMEngine.load(checkpoint, kernels, limits))
    if options.device == "cuda":
        bench.prefill(16)
    recorder = StepRecorder(bench.engine, CUDAClock() if options.device == "cuda" else None)
    cases = [decoding(bench, recorder, batch, sampling) for sampling in SAMPLINGS for batch in options.batches]
    if options.device == "cuda":
        cases += [mixed(bench, recorder, *case) for case in MIXED]
    print_table(cases, console)
    gpu = this_gpu(kernels.read_bandwidth()) if options.device == "cuda" else None
    return Report(machine=machine, gpu=gpu, device=kernels.device_name, model=options.model, cases=cases)


def print_table(cases: list[Case], console: Console) -> None:
    table = Table("sampling", "batch", "tokens of a step", title="us, medians")
    for column in ("step", "host", "host, most", *HOST_PARTS, "device", "device idle"):
        table.add_column(column, justify="right")
    for case in cases:
        numbers = (case.step_us, case.host_us, case.host_max_us, *case.parts_us.values(), case.device_us, case.idle_us)
        cells = ("" if number is None else f"{number:,.0f}" for number in numbers)
        table.add_row(case.sampling, str(case.batch), str(case.budget or case.batch), *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "none"), default="cuda")
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--json", type=Path, help="also write the report there")
    options = parser.parse_args()
    report = measure(options, Console(stderr=True, width=170))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.encode(report) + b"\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
