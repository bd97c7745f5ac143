"""`make bench-gpu`: this GPU's roof, the kernels, the engine with four models' shapes, a worker's start: one report.

Each part runs in a process of its own (`gpu_kernels`, `gpu_engine`, `start_time`), so that none finds another's memory
taken. `gpu_tables` makes the tables of docs/performance.md from the report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from loadtest import gpu_engine, gpu_kernels, start_time
from loadtest.gpu import GPU, PACKAGES
from loadtest.gpu_report import EngineSpeed, GPUReport, KernelSpeed
from loadtest.machine import this_machine
from loadtest.random_model import SHAPES

RESULTS = Path(__file__).parent.parent / "docs" / "results"
PARTS = ("kernels", "engines", "start")
FULL_MODEL = "llama-3-8b"  # which gets the workloads and the start too; the others decode and prefill

_Report = TypeVar("_Report", bound=msgspec.Struct)


def measure(parts: list[str], models: list[str]) -> GPUReport:
    machine = this_machine(PACKAGES)
    gpu: GPU | None = None
    kernels: list[KernelSpeed] = []
    if "kernels" in parts:
        report = part("loadtest.gpu_kernels", gpu_kernels.Report)
        gpu, kernels = report.gpu, report.kernels
    engines: list[EngineSpeed] = []
    for model in models if "engines" in parts else ():
        kinds = ("workload", "prefill", "decode") if model == FULL_MODEL else ("prefill", "decode")
        engine = part("loadtest.gpu_engine", gpu_engine.Report, "--model", model, "--kinds", *kinds)
        gpu = gpu or engine.gpu
        engines.append(engine.engine)
    starts = []
    if "start" in parts:
        directory = Path(tempfile.gettempdir()) / f"nibble-random-{FULL_MODEL}"
        starts = start_time.measure(directory, FULL_MODEL, rounds=3)
    return GPUReport(machine=machine, gpu=gpu, kernels=kernels, engines=engines, starts=starts)


def part(module: str, report: type[_Report], *options: str) -> _Report:
    """What a module writes with --json; its lines go to this process's stderr."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", module, *options, "--json", file.name]
        subprocess.run(command, check=True, stdout=sys.stderr)
        return msgspec.json.decode(Path(file.name).read_bytes(), type=report)


def default_path(report: GPUReport) -> Path:
    name = report.gpu.name if report.gpu else "start"
    short = name.removeprefix("NVIDIA ").split()[0].lower()
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{short}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report there (default: docs/results/<date>-<gpu>.json)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    report = measure(options.parts, options.models)
    path = options.json or default_path(report)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main()
