"""`python -m loadtest.grammar_speed`: what constrained decoding costs the host, with the demo model's tokenizer.

Three tables: the time to compile grammars; the time of a step's masks and tokens, by sequences in it; and the engine's
steps on this machine's CPUs with and without a grammar, with the part of a step that it waits for masks. Texts are
random walks of what the masks allow, so they visit more states than a model's do.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor
from rich.console import Console
from rich.table import Table

from loadtest.machine import StolenTime, this_machine
from nibble.engine.checkpoint.resolve import resolve_checkpoint
from nibble.engine.grammar import MAX_THREADS, Constraints
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, GrammarKind, GrammarSpec, SamplingParams
from nibble.grammar.compiler import GrammarCompiler
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.slots import mask_words
from nibble.service.demo_model import fetch_demo_model

Result = TypeVar("Result")
ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
    "required": ["street", "zip"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "at": {"type": "string", "format": "date-time"},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
            "required": ["name"],
            "additionalProperties": False,
        },
        "ship_to": {"anyOf": [{"$ref": "#/$defs/address"}, {"type": "null"}]},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"sku": {"enum": [f"sku-{i}" for i in range(200)]}, "count": {"type": "integer"}},
                "required": ["sku", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["id", "at", "customer", "ship_to", "lines"],
    "additionalProperties": False,
    "$defs": {"address": ADDRESS},
}
GRAMMARS = {
    "json_object": GrammarSpec(GrammarKind.JSON_OBJECT),
    "schema, flat": GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(ADDRESS)),
    "schema, nested": GrammarSpec(GrammarKind.JSON_SCHEMA, json.dumps(ORDER)),
    "schema, 200 properties": GrammarSpec(
        GrammarKind.JSON_SCHEMA,
        json.dumps({"type": "object", "properties": {f"property_{i}": {"type": "string"} for i in range(200)}}),
    ),
    "regex": GrammarSpec(GrammarKind.REGEX, r"[A-Z][a-z]+ ([A-Z]\. )?[A-Z][a-z]+, \d{4}-\d{2}-\d{2}(: .{1,200})?"),
    "choice of 1000": GrammarSpec(GrammarKind.CHOICE, json.dumps([f"choice number {i}" for i in range(1000)])),
    "lark": GrammarSpec(GrammarKind.LARK, 'start: sum\nsum: term (("+" | "-") term)*\nterm: /[0-9]+/ | "(" sum ")"'),
}


def milliseconds(times_s: list[float]) -> list[str]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(times_s)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return [f"{value * 1e3:.3f}" for value in (statistics.median(ordered), p99, ordered[-1])]


def timed(times_s: list[float], action: Callable[..., Result], *arguments: Any) -> Result:
    start_s = time.perf_counter()
    result = action(*arguments)
    times_s.append(time.perf_counter() - start_s)
    return result


def compile_times(compiler: GrammarCompiler, repeats: int) -> Table:
    table = Table("grammar", "compile ms, median", "p99", "max", "copy of a known one ms, median", "p99", "max")
    for name, spec in GRAMMARS.items():
        whole: list[float] = []
        copies: list[float] = []
        for _ in range(repeats):
            timed(whole, compiler._compile, spec)
            compiler.matcher(spec)
            timed(copies, compiler.matcher, spec)
        table.add_row(name, *milliseconds(whole), *milliseconds(copies))
    return table


def mask_times(compiler: GrammarCompiler, num_steps: int) -> Table:
    table = Table("sequences", "masks ms, median", "p99", "max", "tokens ms, median", "p99", "max")
    for num_sequences in (1, 8, 32, 128, 256):
        fills, reads = _walk(compiler, num_sequences, num_steps)
        table.add_row(str(num_sequences), *milliseconds(fills), *milliseconds(reads))
    return table


def _walk(compiler: GrammarCompiler, num_sequences: int, num_steps: int) -> tuple[list[float], list[float]]:
    rng, executor = random.Random(num_sequences), LLExecutor(MAX_THREADS)
    specs = list(GRAMMARS.values())
    matchers = [compiler.matcher(rng.choice(specs)) for _ in range(num_sequences)]
    masks = np.zeros((num_sequences, mask_words(compiler.vocab_size)), np.int32)
    fills: list[float] = []
    reads: list[float] = []
    for _ in range(num_steps):
        rows = [(matcher, i) for i, matcher in enumerate(matchers)]
        timed(fills, executor.unsafe_compute_mask_ptr, rows, masks.ctypes.data, masks.strides[0], num_sequences)
        drawn = [
            (matcher, _draw(mask, rng, compiler.tokenizer.eos_token))
            for matcher, mask in zip(matchers, masks, strict=True)
        ]
        timed(reads, executor.consume_token_par, drawn)
        matchers = [compiler.matcher(rng.choice(specs)) if done.is_stopped() else done for done in matchers]
    return fills, reads


def _draw(mask: npt.NDArray[np.int32], rng: random.Random, eos_token_id: int) -> int:
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    text = allowed[allowed != eos_token_id]
    return int(rng.choice(text if len(text) else allowed))


def engine_times(directory: Path, num_steps: int) -> Table:
    table = Table(
        "sequences", "grammar", "step ms, median", "p99", "max", "of it reading, waiting ms, median", "p99", "max"
    )
    kernels = CPUKernels()
    engine = LLMEngine.from_checkpoint(directory, kernels, EngineLimits(256 << 20, max_num_sequences=16))
    assert engine.constraints is not None
    for num_sequences in (1, 16):
        for name, spec in {"none": None, "schema, nested": GRAMMARS["schema, nested"]}.items():
            steps, waits = _decode(engine, engine.constraints, num_sequences, spec, num_steps)
            table.add_row(str(num_sequences), name, *milliseconds(steps), *milliseconds(waits))
    kernels.close()
    return table


def _decode(
    engine: LLMEngine, constraints: Constraints, num_sequences: int, spec: GrammarSpec | None, num_steps: int
) -> tuple[list[float], list[float]]:
    """Times of whole steps, and of each what is spent on grammars while nothing else is done."""
    spent = [0.0]
    settle, read = constraints.settle, constraints.read

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def run(argument: Any) -> Any:
            start_s = time.perf_counter()
            result = action(argument)
            spent[0] += time.perf_counter() - start_s
            return result

        return run

    constraints.settle, constraints.read = counted(settle), counted(read)  # type: ignore[method-assign] # for timing
    for i in range(num_sequences):
        sampling = SamplingParams(max_tokens=num_steps, seed=i)
        prompt = list(range(20, 52))
        engine.add(
            GenerationRequest(
                request_id=f"{i}", prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0, grammar=spec
            )
        )
    steps: list[float] = []
    waits: list[float] = []
    while engine.has_unfinished:
        spent[0] = 0.0
        timed(steps, engine.step)
        waits.append(spent[0])
    constraints.settle, constraints.read = settle, read  # type: ignore[method-assign] # as it was
    return steps[3:], waits[3:]  # without prompts and compiling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "nibble")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    console, stolen = Console(width=140), StolenTime()
    console.print(this_machine(("llguidance", "numpy")))
    gguf = fetch_demo_model(options.cache_dir, lambda stage, done: None)
    directory = resolve_checkpoint(gguf, options.cache_dir, lambda stage, done: None)
    config = json.loads((directory / "config.json").read_bytes())
    compiler = GrammarCompiler(directory / "tokenizer.json", config["vocab_size"], [2])
    build: list[float] = []
    timed(build, getattr, compiler, "tokenizer")
    console.print(f"tokenizer of {compiler.vocab_size} tokens: {build[0] * 1e3:.0f} ms")
    console.print(compile_times(compiler, options.repeats))
    console.print(mask_times(compiler, options.steps))
    console.print(engine_times(directory, options.steps))
    console.print(f"stolen by other machines of this host: {stolen.share():.0%}")


if __name__ == "__main__":
    main()
