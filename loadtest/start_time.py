"""`python -m loadtest.start_time`: from the start of a process to its first token, stage by stage.

Writes a native checkpoint of random weights (once; it is left there), reads it so that its pages are in the cache, and
then starts processes that do what a worker does with its engine: import it, `LLMEngine.from_checkpoint`, a prompt of 16
tokens. Kernels come from the user's cache, filled by `python -m nibble.kernels.cuda.build` or an earlier start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest.gpu_report import StartTime

PROMPT_TOKENS = 16
READ_BYTES = 64 << 20


class Stages:
    """A clock that begins when the process was started: at a time that its parent took."""

    def __init__(self, began_s: float) -> None:
        self._began_s = self._last_s = began_s
        self.stages: dict[str, float] = {}

    def end(self, stage: str) -> None:
        now_s = time.time()
        self.stages[stage] = round(self.stages.get(stage, 0.0) + now_s - self._last_s, 3)
        self._last_s = now_s

    def ending(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which now ends a stage by returning."""

        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.end(stage)
            return result

        return call

    @property
    def total_s(self) -> float:
        return round(self._last_s - self._began_s, 3)


def start(directory: Path, model: str, began_s: float) -> StartTime:
    """What a worker does, in this process."""
    stages = Stages(began_s)
    from loadtest.step_timing import Bench
    from nibble.engine.limits import EngineLimits
    from nibble.engine.llm_engine import LLMEngine
    from nibble.engine.model_runner import ModelRunner
    from nibble.kernels.cuda.backend import CUDAKernels
    from nibble.kernels.layout import KVLayout

    stages.end("imports")
    kernels = CUDAKernels()
    stages.end("CUDA context")
    warm_up = stages.ending("kernels", kernels.warm_up)

    def weights_are_there(layouts: Sequence[KVLayout] = ()) -> None:
        kernels.device.stream.synchronize()
        stages.end("weights")
        warm_up(layouts)

    # Stages end inside of from_checkpoint, which shows no others its progress: its own calls are timed.
    kernels.warm_up = weights_are_there  # type: ignore[method-assign]  # as the comment above says, and the next two
    kernels.fit_workspace = stages.ending("workspace", kernels.fit_workspace)  # type: ignore[method-assign]
    ModelRunner.capture = stages.ending("graphs", ModelRunner.capture)  # type: ignore[method-assign]
    engine = LLMEngine.from_checkpoint(directory, kernels, EngineLimits(None, 256, 8192))
    stages.end("rest")
    Bench(engine).prefill(PROMPT_TOKENS)
    stages.end("first token")
    return StartTime(model=model, weight_bytes=engine.weight_bytes, stages=stages.stages, total_s=stages.total_s)


def write_random_checkpoint(directory: Path, model: str) -> None:
    from loadtest.random_model import SHAPES, RandomCheckpoint
    from nibble.engine.checkpoint.native import WEIGHTS_FILE

    if not (directory / WEIGHTS_FILE).exists():
        directory.mkdir(parents=True, exist_ok=True)
        RandomCheckpoint(SHAPES[model]).write(directory)
    with (directory / WEIGHTS_FILE).open("rb") as file:
        while file.read(READ_BYTES):
            pass


def measure(directory: Path, model: str, rounds: int) -> list[StartTime]:
    """The starts in order; the first may find what the machine itself has to load not yet in memory."""
    write_random_checkpoint(directory, model)
    starts = []
    for _ in range(rounds):
        command = [sys.executable, "-m", "loadtest.start_time", "--model", model, "--directory", str(directory)]
        result = subprocess.run([*command, "--began", repr(time.time())], check=True, capture_output=True)
        starts.append(msgspec.json.decode(result.stdout, type=StartTime))
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument(
        "--directory", type=Path, help="of the checkpoint (default: in the directory of temporary files)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # be the process that is measured
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.gettempdir()) / f"nibble-random-{options.model}"
    if options.began is not None:
        sys.stdout.buffer.write(msgspec.json.encode(start(directory, options.model, options.began)))
        return
    for result in measure(directory, options.model, options.rounds):
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.stages.items())
        sys.stdout.write(f"{result.model}: {result.total_s:.2f} s ({stages})\n")


if __name__ == "__main__":
    main()
