"""One engine in a process of its own, so that engines do not share threads, allocators or libraries.

`python -m loadtest.engines.process KIND GGUF CACHE_DIR NUM_THREADS` prints one JSON line when the model is loaded, then
answers each line of stdin, a Task, with the seconds it took. `EngineProcess` is the other end.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import msgspec

from loadtest.engines.interface import EngineNotInstalled, SpeedEngine

KINDS = ("nibble", "transformers-float32", "transformers-bfloat16", "llama.cpp")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to compute: prompts of random token ids, drawn from the seed."""

    kind: Literal["prefill", "decode"]
    num_prompts: int
    prompt_tokens: int
    num_tokens: int
    seed: int


class Loaded(msgspec.Struct, frozen=True):
    """seconds: from the start of the process. missing: why there is no engine."""

    seconds: float
    missing: str | None = None


class EngineProcess:
    """A loaded engine. Raises EngineNotInstalled."""

    def __init__(self, kind: str, gguf: Path, cache_dir: Path, num_threads: int) -> None:
        command = [sys.executable, "-m", __name__, kind, str(gguf), str(cache_dir), str(num_threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        loaded = msgspec.json.decode(self._read_line(kind), type=Loaded)
        if loaded.missing:
            self.close()
            raise EngineNotInstalled(loaded.missing)

    def run(self, task: Task) -> float:
        """The seconds it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(task) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._read_line(task.kind), type=float)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read_line(self, doing: str) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine process ended during {doing}, exit code {self._process.wait()}")
        return line


def load(kind: str, gguf: Path, cache_dir: Path, num_threads: int) -> SpeedEngine:
    """Raises EngineNotInstalled."""
    if kind == "nibble":
        from loadtest.engines.nibble_engine import NibbleEngine

        return NibbleEngine(gguf, cache_dir, num_threads)
    if kind.startswith("transformers-"):
        from loadtest.engines.transformers_engine import TransformersEngine

        return TransformersEngine(gguf, kind.removeprefix("transformers-"), num_threads)
    from loadtest.engines.llama_cpp_engine import LlamaCppEngine

    return LlamaCppEngine(gguf, num_threads)


def compute(engine: SpeedEngine, task: Task) -> float:
    draw = random.Random(task.seed)
    prompts = [[draw.randrange(engine.vocab_size) for _ in range(task.prompt_tokens)] for _ in range(task.num_prompts)]
    return engine.prefill(prompts[0]) if task.kind == "prefill" else engine.decode(prompts, task.num_tokens)


def main() -> None:
    start_s = time.perf_counter()
    kind, gguf, cache_dir, num_threads = sys.argv[1:]
    try:
        engine = load(kind, Path(gguf), Path(cache_dir), int(num_threads))
    except EngineNotInstalled as error:
        _write(Loaded(0.0, str(error)))
        return
    _write(Loaded(time.perf_counter() - start_s))
    for line in sys.stdin:
        _write(compute(engine, msgspec.json.decode(line, type=Task)))


def _write(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
