"""The prefix cache under a real model: logits and tokens are those of an empty cache, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from late_kernels import LateKernels
from model_logits import TEXT
from tiny_models import make_tiny_llama
from tokenizers import Tokenizer

from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Array
from nibble.kernels.layout import KVDtype

VOCAB_SIZE = 300
BLOCK_BYTES = 2 * 2 * (2 * 64 * 32 + 2 * 64 * 4)  # two layers, two KV heads of 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=640)
    return directory


@contextmanager
def engine_of(
    directory: Path, kernels: CPUKernels, num_blocks: int, block_bytes: int = BLOCK_BYTES, **limits: Any
) -> Iterator[LLMEngine]:
    try:
        yield LLMEngine.from_checkpoint(directory, kernels, EngineLimits((num_blocks + 1) * block_bytes, **limits))
    finally:
        kernels.close()


def recorded_logits(engine: LLMEngine) -> list[npt.NDArray[np.float32]]:
    """What the model's logits will be, one array for each pass that samples."""
    logits: list[npt.NDArray[np.float32]] = []
    model, compute = engine.runner.model, engine.runner.model.logits

    def record(x: Array, rows: Array) -> Array:
        result = compute(x, rows)
        logits.append(result.copy())
        return result

    model.logits = record  # type: ignore[method-assign]  # seen where they come out, with the real model behind
    return logits


def run(engine: LLMEngine, *requests: GenerationRequest) -> dict[str, list[int]]:
    for each in requests:
        engine.add(each)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    while engine.has_unfinished:
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
    return tokens


def greedy(name: str, prompt: list[int], max_tokens: int) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, arrival_s=0.0)


def logits_after_a_cached_prefix(
    directory: Path, prompt: list[int], block_bytes: int, **limits: Any
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """Logits of a prompt's end and 20 tokens, computed with an empty cache, and with one that has the prompt; and how
    many tokens were found in it."""
    with engine_of(directory, CPUKernels(), 24, block_bytes, **limits) as engine:
        empty = recorded_logits(engine)
        run(engine, greedy("a", prompt, 20))
    with engine_of(directory, CPUKernels(), 24, block_bytes, **limits) as engine:
        run(engine, greedy("before", [*prompt, 17], 1))
        found = recorded_logits(engine)
        run(engine, greedy("a", prompt, 20))
        return np.concatenate(empty), np.concatenate(found), engine.stats.num_cache_hits


@pytest.mark.parametrize("kv_dtype", [KVDtype.INT8, KVDtype.FP16])
def test_logits_after_a_cached_prefix_are_the_same_bits(tiny: Path, kv_dtype: KVDtype) -> None:
    prompt = np.random.default_rng(3).integers(0, VOCAB_SIZE, 400).tolist()
    block_bytes = BLOCK_BYTES if kv_dtype is KVDtype.INT8 else 2 * 2 * 2 * 64 * 32 * 2
    empty, found, num_hits = logits_after_a_cached_prefix(tiny, prompt, block_bytes, kv_dtype=kv_dtype)
    assert num_hits == 384
    assert np.array_equal(empty, found)


def test_logits_of_the_demo_model_after_a_cached_prefix_are_the_same_bits(demo_checkpoint: Path) -> None:
    prompt = Tokenizer.from_file(str(demo_checkpoint / "tokenizer.json")).encode(TEXT * 2).ids[:400]
    block_bytes = 30 * 3 * (2 * 64 * 64 + 2 * 64 * 4)
    empty, found, num_hits = logits_after_a_cached_prefix(
        demo_checkpoint, prompt, block_bytes, max_num_sequences=4, max_num_batched_tokens=100
    )
    assert num_hits == 384
    assert np.array_equal(empty, found)


@pytest.fixture(scope="module")
def conversations(tiny: Path) -> list[tuple[GenerationRequest, list[int]]]:
    """Four conversations of four turns over two system prompts, three choices each, and each one's tokens, computed
    alone and without the cache. A turn's prompt is the one before, its first choice, and a question."""
    rng = np.random.default_rng(1)
    systems = [rng.integers(0, VOCAB_SIZE, size).tolist() for size in (150, 128)]
    turns: list[tuple[GenerationRequest, list[int]]] = []
    with engine_of(tiny, CPUKernels(), 12, has_prefix_cache=False) as engine:
        for number in range(4):
            prompt = list(systems[number % 2])
            for turn in range(4):
                prompt += rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 50))).tolist()
                for choice in range(3):
                    each = GenerationRequest(
                        request_id=f"{number}.{turn}.{choice}",
                        prompt_token_ids=list(prompt),
                        sampling=SamplingParams(
                            max_tokens=int(rng.integers(5, 70)),
                            temperature=float(rng.choice([0.0, 1.0])),
                            seed=int(rng.integers(1 << 60)),
                        ),
                        arrival_s=float(turn * 10 + choice),
                    )
                    turns.append((each, run(engine, each)[each.request_id]))
                prompt += turns[-3][1]
    return turns


@pytest.mark.parametrize("make_kernels", [CPUKernels, LateKernels])
@pytest.mark.parametrize("seed", range(3))
def test_conversations_get_the_tokens_that_they_get_without_the_cache(
    tiny: Path,
    conversations: list[tuple[GenerationRequest, list[int]]],
    make_kernels: Callable[[], CPUKernels],
    seed: int,
) -> None:
    """All turns at once and in a random order, with blocks for a few of them; some come back with a part of their
    tokens, as from another worker."""
    rng = np.random.default_rng(seed)
    limits = {"max_num_sequences": int(rng.integers(2, 10)), "max_num_batched_tokens": int(rng.integers(10, 150))}
    with engine_of(tiny, make_kernels(), int(rng.integers(12, 20)), **limits) as engine:
        tokens: dict[str, list[int]] = {}
        for index in rng.permutation(len(conversations)):
            each, expected = conversations[index]
            tokens[each.request_id] = expected[: rng.integers(len(expected))] if rng.integers(3) == 0 else []
            arrival_s = each.arrival_s + float(rng.integers(20))
            engine.add(msgspec.structs.replace(each, arrival_s=arrival_s), tokens[each.request_id])
        while engine.has_unfinished:
            for event in engine.step():
                assert event.index == len(tokens[event.request_id])
                tokens[event.request_id] += event.token_ids
        assert tokens == {each.request_id: expected for each, expected in conversations}
        assert engine.stats.num_cache_hits > 1000
