"""`python -m loadtest.speculation`: tokens per second with drafts and without, through `LLMEngine.step`.

    copy      the demo model is asked to repeat a text that is in the prompt: n-grams find nearly all of it
    open      it is asked for a story: little of it has been there before
    replay    on either device, random weights of a model's shape: drafts come from a recording of the same requests
              and are right with a given probability. Random weights repeat nothing by themselves; this shows what
              drafts of that quality are worth on the device, not how good a drafter is.

All sequences of a batch are added at once, greedy; counted are the tokens and the time from the moment when each has
its first token to the first one's end. Runs with and without drafts take turns, and the tokens must be the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from loadtest.gpu_engine import make_kernels
from loadtest.machine import Machine, StolenTime, this_machine
from loadtest.random_model import SHAPES, RandomCheckpoint
from nibble.engine.draft_model import step_cost
from nibble.engine.limits import MAX_DRAFTS, EngineLimits, SpeculationMethod
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.engine.speculative import Drafter, NgramDrafter, Speculation

PACKAGES = ("numpy", "numba", "cupy-cuda13x")
BATCHES = (1, 2, 4, 8)
REPLAY_BATCHES = (1, 4, 8, 16, 32)
ACCURACIES = (0.0, 0.5, 0.8, 1.0)
REPLAY_TOKENS = (128, 192)  # prompt, output
TEXT_TOKENS = 160

PASSAGES = (
    "The lighthouse keeper wrote in his journal every evening. On the third of March 1921 he noted that the wind came "
    "from the north-west, that 17 ships had passed, and that the lamp needed 2.5 litres of oil. In the morning the "
    "boat brought bread, newspapers, a letter with a blue stamp, and the news that the school would open again. The "
    "keeper read the letter twice, put it into the drawer, and went up to the lamp. He filled it, trimmed the wick, "
    "climbed down the 112 steps and waited until the fog lifted and the sea lay grey and quiet below the rocks.",
    """def read_table(path, delimiter):
    rows = []
    with open(path) as file:
        for line in file:
            fields = line.strip().split(delimiter)
            rows.append([field.strip() for field in fields])
    return rows


def column_sum(rows, index):
    total = 0.0
    for row in rows:
        total += float(row[index])
    return total


def column_mean(rows, index):
    return column_sum(rows, index) / len(rows)
""",
)
SUBJECTS = ("a lighthouse", "an old train", "two brothers", "a letter", "the desert", "a chess game", "bees", "rain")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """drafts: where they come from; accuracy: of a replay. Medians of the rounds, and their range."""

    workload: str
    batch: int
    drafts: str
    accuracy: float | None
    tokens_per_s: float
    slowest: float
    fastest: float
    step_ms: float
    num_draft_tokens: int
    num_accepted_tokens: int
    is_same_text: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    machine: Machine
    device: str
    model: str
    stolen_share: float
    results: list[Result]


class ReplayDrafter:
    """Drafts out of a recording, each right with a given probability."""

    def __init__(self, outputs: dict[str, list[int]], accuracy: float, vocab_size: int) -> None:
        self._outputs = outputs
        self._accuracy = accuracy
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        drafts = []
        for sequence, count in wishes.items():
            first = sequence.num_read_tokens
            right = np.array(self._outputs[sequence.request_id][first : first + count], int)
            is_wrong = self._rng.random(len(right)) >= self._accuracy
            drafts.append(((right + is_wrong) % self._vocab_size).tolist())
        return drafts

    def is_promising(self, sequence: Sequence) -> bool:
        return True

    def forget(self, sequence: Sequence) -> None:
        pass


class Run(msgspec.Struct, kw_only=True):
    """One pass of a batch through an engine."""

    tokens: dict[str, list[int]]
    num_timed: int
    seconds: float
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int


def run(engine: LLMEngine, prompts: list[list[int]], num_tokens: int) -> Run:
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        tokens[str(i)] = []
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        engine.add(GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(i)))
    start_s = stop_s = 0.0
    speculation = engine.speculation
    before = engine.stats.num_steps
    num_steps = num_untimed = num_timed = 0
    while engine.has_unfinished:
        events = engine.step()
        for event in events:
            tokens[event.request_id] += event.token_ids
        if start_s and not stop_s and any(event.finish_reason for event in events):
            stop_s, num_timed = time.perf_counter(), sum(map(len, tokens.values())) - num_untimed
            num_steps = engine.stats.num_steps - before
        if not start_s and all(tokens.values()):
            start_s, num_untimed = time.perf_counter(), sum(map(len, tokens.values()))
            before = engine.stats.num_steps
    return Run(
        tokens=tokens,
        num_timed=num_timed,
        seconds=stop_s - start_s,
        num_steps=num_steps,
        num_draft_tokens=0 if speculation is None else speculation.num_draft_tokens,
        num_accepted_tokens=0 if speculation is None else speculation.num_accepted_tokens,
    )


class Bench:
    """An engine that may have drafts."""

    def __init__(self, checkpoint: Any, device: str, max_batch: int) -> None:
        self.kernels = make_kernels(device)
        self.kernels.warm_up()
        limits = EngineLimits(
            kv_cache_bytes=(512 << 20) if device == "cpu" else None,
            max_num_sequences=max_batch,
            speculation=SpeculationMethod.NGRAM,
        )
        self.engine = LLMEngine.load(checkpoint, self.kernels, limits)
        self.cost = step_cost(self.engine.runner)

    def compare(
        self, workload: str, prompts: list[list[int]], num_tokens: int, rounds: int, accuracies: tuple[float, ...] = ()
    ) -> list[Result]:
        """Without drafts, and with replays of these accuracies; where there are none, with n-grams."""
        expected = self._run(None, prompts, num_tokens).tokens  # not counted: it also warms up
        cases: list[tuple[str, float | None]] = [("none", None)]
        cases += [("replay", accuracy) for accuracy in accuracies] or [("ngram", None)]
        runs: list[list[Run]] = [[] for _ in cases]
        for _ in range(rounds):
            for (drafts, accuracy), case in zip(cases, runs, strict=True):
                drafter: Drafter | None = NgramDrafter() if drafts == "ngram" else None
                if accuracy is not None:
                    drafter = ReplayDrafter(expected, accuracy, self.engine.config.vocab_size)
                case.append(self._run(drafter, prompts, num_tokens))
        return [_result(workload, *case, each, expected) for case, each in zip(cases, runs, strict=True)]

    def _run(self, drafter: Drafter | None, prompts: list[list[int]], num_tokens: int) -> Run:
        self.engine.speculation = None if drafter is None else Speculation(drafter, MAX_DRAFTS, self.cost)
        return run(self.engine, prompts, num_tokens)


def _result(
    workload: str, drafts: str, accuracy: float | None, runs: list[Run], expected: dict[str, list[int]]
) -> Result:
    runs = sorted(runs, key=lambda each: each.num_timed / each.seconds)
    middle = runs[len(runs) // 2]
    return Result(
        workload=workload,
        batch=len(expected),
        drafts=drafts,
        accuracy=accuracy,
        tokens_per_s=round(middle.num_timed / middle.seconds, 1),
        slowest=round(runs[0].num_timed / runs[0].seconds, 1),
        fastest=round(runs[-1].num_timed / runs[-1].seconds, 1),
        step_ms=round(middle.seconds / middle.num_steps * 1e3, 3),
        num_draft_tokens=middle.num_draft_tokens,
        num_accepted_tokens=middle.num_accepted_tokens,
        is_same_text=all(each.tokens == expected for each in runs),
    )


def demo_checkpoint_dir() -> Path:
    from nibble.engine.checkpoint.resolve import resolve_checkpoint
    from nibble.service.demo_model import fetch_demo_model

    cache_dir = Path.home() / ".cache" / "nibble"
    return resolve_checkpoint(fetch_demo_model(cache_dir, lambda *_: None), cache_dir, lambda *_: None)


def text_prompts(directory: Path, num_prompts: int) -> dict[str, list[list[int]]]:
    """Token ids of chats, for each workload."""
    from nibble.service.gateway.served_model import load_served_model

    model = load_served_model(directory)
    assert model.chat_template is not None, "the demo model chats"
    tasks = {
        "copy": [f"Repeat this text exactly:\n\n{PASSAGES[i % len(PASSAGES)]}" for i in range(num_prompts)],
        "open": [f"Tell me a story about {SUBJECTS[i % len(SUBJECTS)]}." for i in range(num_prompts)],
    }
    return {
        name: [model.encode(model.chat_template.render([{"role": "user", "content": text}])) for text in texts]
        for name, texts in tasks.items()
    }


def measure_texts(bench: Bench, prompts: dict[str, list[list[int]]], rounds: int, console: Console) -> list[Result]:
    results = []
    for workload, each in prompts.items():
        for batch in BATCHES:
            results += bench.compare(workload, each[:batch], TEXT_TOKENS, rounds)
            console.print(*results[-2:], sep="\n")
    return results


def measure_replays(bench: Bench, rounds: int, console: Console) -> list[Result]:
    rng, results = np.random.default_rng(0), []
    num_prompt_tokens, num_tokens = REPLAY_TOKENS
    for batch in REPLAY_BATCHES:
        prompts = rng.integers(10, bench.engine.config.vocab_size, (batch, num_prompt_tokens)).tolist()
        results += bench.compare("replay", prompts, num_tokens, rounds, ACCURACIES)
        console.print(*results[-1 - len(ACCURACIES) :], sep="\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("demo", *SHAPES), default="demo", help="demo: copy and open, else replay")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    machine, stolen, console = this_machine(PACKAGES), StolenTime(), Console(stderr=True, width=200)
    if options.model == "demo":
        from nibble.engine.checkpoint.native import load_checkpoint

        directory = demo_checkpoint_dir()
        bench = Bench(load_checkpoint(directory), options.device, max(BATCHES))
        results = measure_texts(bench, text_prompts(directory, max(BATCHES)), options.rounds, console)
    else:
        bench = Bench(RandomCheckpoint(SHAPES[options.model]), options.device, max(REPLAY_BATCHES))
        results = measure_replays(bench, options.rounds, console)
    report = Report(
        machine=machine,
        device=bench.kernels.device_name,
        model=options.model,
        stolen_share=stolen.share(),
        results=results,
    )
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")


if __name__ == "__main__":
    main()
