"""What an engine generates, and how fast: the same prompts, greedily, one at a time and many at once."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nibble.engine import offline
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams

BATCH = 32


@dataclass(frozen=True)
class Generation:
    """token_ids: of each prompt. Rates: tokens generated per second by the engine, prompts included."""

    token_ids: list[list[int]]
    tokens_per_s_alone: float
    tokens_per_s_batch: float


def generate(engine: LLMEngine, prompts: list[list[int]], num_tokens: int) -> Generation:
    """BATCH prompts or fewer. Nothing ends a generation early."""
    assert 0 < len(prompts) <= BATCH, f"{len(prompts)} prompts, at most {BATCH}"
    _run(engine, prompts, 2)  # the first step of each shape is not what is measured
    _run(engine, prompts[:1], 2)
    start_s = time.perf_counter()
    _run(engine, prompts[:1], num_tokens)
    alone_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    token_ids = _run(engine, prompts, num_tokens)
    batch_s = time.perf_counter() - start_s
    return Generation(token_ids, num_tokens / alone_s, num_tokens * len(prompts) / batch_s)


def agreement(reference: list[list[int]], token_ids: list[list[int]]) -> float:
    """The mean share of a generation that comes before its first token that is not the reference's."""
    shares = []
    for expected, found in zip(reference, token_ids, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), len(expected))
        shares.append(same / len(expected))
    return sum(shares) / len(shares)


def _run(engine: LLMEngine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
    requests = [
        GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=time.time())
        for i, prompt in enumerate(prompts)
    ]
    return [completion.token_ids for completion in offline.generate(engine, requests)]
