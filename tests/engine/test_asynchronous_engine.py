"""A real model over a device that is late: the tokens are those of the synchronous engine, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from late_kernels import WORKSPACE_BYTES, LateKernels
from random_params import adjustments, stop_ids
from tiny_models import make_tiny_llama

from nibble.engine.errors import CapacityError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from nibble.kernels.cpu.backend import CPUKernels

VOCAB_SIZE = 300
Late = Callable[..., LateKernels]
BLOCK_BYTES = 2 * 2 * (2 * 64 * 32 + 2 * 64 * 4)  # two layers, two KV heads of 32


class Expected(NamedTuple):
    request: GenerationRequest
    tokens: list[int]
    logprobs: list[bytes | None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=256)
    return directory


@pytest.fixture
def late() -> Iterator[Callable[..., LateKernels]]:
    """Makes backends; their threads are stopped at the end."""
    made: list[LateKernels] = []

    def make(total_bytes: int = 1 << 30) -> LateKernels:
        made.append(LateKernels(total_bytes))
        return made[-1]

    yield make
    for kernels in made:
        kernels.close()


@pytest.fixture(scope="module")
def requests(tiny: Path) -> list[Expected]:
    """Thirty requests and their tokens, each computed alone and synchronously; a third adjusts nothing."""
    rng = np.random.default_rng(0)
    kernels = CPUKernels()
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(kv_cache_bytes=16 * BLOCK_BYTES))
    pairs: list[Expected] = []
    for i in range(30):
        max_tokens = int(rng.integers(1, 90))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=float(rng.choice([0.0, 0.8, 1.5])),
            top_p=float(rng.choice([0.9, 1.0])),
            seed=int(rng.integers(1 << 63)) * 2 + 1,
            **(
                {"stop_token_ids": stop_ids(rng, VOCAB_SIZE)}
                if i % 3 == 0
                else adjustments(rng, VOCAB_SIZE, max_tokens)
            ),
        )
        prompt = rng.integers(0, VOCAB_SIZE, rng.integers(1, 150)).tolist()
        request = GenerationRequest(
            request_id=str(i), prompt_token_ids=prompt, sampling=sampling, arrival_s=float(rng.integers(1000))
        )
        engine.add(request)
        events = run(engine)
        tokens = [token_id for event in events for token_id in event.token_ids]
        pairs.append(Expected(request, tokens, [event.logprobs for event in events]))
    kernels.close()
    assert any(tokens[-1] in request.sampling.stop_token_ids for request, tokens, _ in pairs)
    return pairs


def run(engine: LLMEngine) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while engine.has_unfinished:
        events += engine.step()
    return events


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_when_requests_join_leave_or_are_preempted(
    tiny: Path, late: Late, requests: list[Expected], seed: int
) -> None:
    """They also are resumed with a part of their tokens, aborted, and start again."""
    rng = np.random.default_rng(seed)
    kernels = late()
    limits = EngineLimits(
        kv_cache_bytes=int(rng.integers(6, 8)) * BLOCK_BYTES,
        max_num_sequences=int(rng.integers(6, 21)),
        max_num_batched_tokens=int(rng.integers(21, 200)),
    )
    engine = LLMEngine.from_checkpoint(tiny, kernels, limits)
    joins_at = {request.request_id: int(rng.integers(60)) for request, _, _ in requests}
    aborted_at = {request.request_id: int(rng.integers(1000)) for request, _, _ in requests}
    outputs: dict[str, list[int]] = {}
    for step in range(2000):
        for request, expected, _ in requests:
            key = request.request_id
            if step == joins_at[key] or (step == aborted_at[key] and key in outputs):
                engine.abort(key)
                outputs[key] = expected[: rng.integers(len(expected))]
                engine.add(request, outputs[key])
        for event in engine.step():
            assert event.index == len(outputs[event.request_id])
            assert event.logprobs == requests[int(event.request_id)].logprobs[event.index]
            outputs[event.request_id] += event.token_ids
        if step > 1000 and not engine.has_unfinished:
            break
    assert engine.scheduler.num_preemptions > 0
    assert kernels.num_replayed > 0
    assert outputs == {request.request_id: expected for request, expected, _ in requests}


def test_graphs_are_captured_for_few_sizes_and_padded_rows_touch_nobody(
    tiny: Path, late: Late, requests: list[Expected]
) -> None:
    """11 sequences decode in a graph of 16 rows, with blocks that another sequence had before."""
    kernels = late()
    engine = LLMEngine.from_checkpoint(
        tiny, kernels, EngineLimits(kv_cache_bytes=60 * BLOCK_BYTES, max_num_sequences=20)
    )
    num_sampling = len([1, 2, 4, 8, 16, 20]) + len([16, 32, 64, 128])
    num_prompts = len([128, 256])
    # What samples is captured plain or not; the largest of each kind twice, to measure.
    assert kernels.num_captured == 2 * (num_sampling + 2) + num_prompts + 1
    for request, _, _ in requests[:11]:
        engine.add(request)
    outputs: dict[str, list[int]] = {}
    for event in run(engine):
        outputs.setdefault(event.request_id, []).extend(event.token_ids)
    assert outputs == {request.request_id: expected for request, expected, _ in requests[:11]}


class SplitKernels(CPUKernels):
    """Computes short prompts and ends of prompts in DECODE mode, as a GPU's backend does."""

    def num_prefill_tokens(self, num_prompt_tokens: int) -> int:
        return (num_prompt_tokens - 1) // 64 * 64 if num_prompt_tokens > 100 else 0


class LateSplitKernels(SplitKernels, LateKernels):
    pass


def test_passes_of_prompts_are_captured_and_padded_rows_touch_nobody(tiny: Path) -> None:
    """Prompts of 1 to 128 tokens go through graphs, alone and beside sequences that decode, and then as many as none is
    captured for; the tokens are those of each prompt alone, op by op."""
    rng = np.random.default_rng(1)
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_token_ids=rng.integers(0, VOCAB_SIZE, num_tokens).tolist(),
            sampling=SamplingParams(max_tokens=6, temperature=0.0, logprobs=2 if i % 2 else None),
            arrival_s=float(i),
        )
        for i, num_tokens in enumerate([1, 2, 15, 16, 17, 64, 65, 99, 100, 101, 128, 129, 200, 240])
    ]
    kernels = SplitKernels()
    engine = LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(60 * BLOCK_BYTES, has_prefix_cache=False))
    expected: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
        expected[request.request_id] = [token_id for event in run(engine) for token_id in event.token_ids]
    kernels.close()
    late = LateSplitKernels()
    engine = LLMEngine.from_checkpoint(tiny, late, EngineLimits(60 * BLOCK_BYTES, has_prefix_cache=False))
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}

    def keep(events: list[TokenEvent]) -> None:
        for event in events:
            outputs[event.request_id] += event.token_ids

    for request in requests:
        replayed, num_steps = late.num_replayed, engine.stats.num_steps
        engine.add(request)
        keep(run(engine))
        assert late.num_replayed - replayed == engine.stats.num_steps - num_steps  # nothing is computed op by op
    assert outputs == expected
    outputs = {request.request_id: [] for request in requests}
    engine.add(requests[0])
    keep(engine.step())
    for request in requests[1:4]:  # beside one that decodes
        engine.add(request)
    keep(engine.step())
    for request in requests[4:]:  # 1,158 tokens
        engine.add(request)
    keep(run(engine))
    late.close()
    assert outputs == expected


def test_preempted_sequences_come_back_from_the_hosts_memory_with_the_same_tokens(
    tiny: Path, late: Late, requests: list[Expected]
) -> None:
    limits = EngineLimits(12 * BLOCK_BYTES, max_num_sequences=20, has_prefix_cache=False, swap_bytes=9 * BLOCK_BYTES)
    engine = LLMEngine.from_checkpoint(tiny, late(), limits)
    assert engine.runner.num_swap_blocks == 9
    for request, _, _ in requests:
        engine.add(request)
    outputs: dict[str, list[int]] = {}
    for event in run(engine):
        outputs.setdefault(event.request_id, []).extend(event.token_ids)
    assert outputs == {request.request_id: expected for request, expected, _ in requests}
    assert 0 < engine.scheduler.swap_space.num_restored <= engine.stats.num_preemptions


def test_the_kv_cache_takes_what_is_left_and_nothing_is_allocated_afterwards(
    tiny: Path, late: Late, requests: list[Expected], caplog: pytest.LogCaptureFixture
) -> None:
    kernels = late(total_bytes=120 << 20)
    limits = EngineLimits(kv_cache_bytes=None, max_num_sequences=200, memory_utilization=0.4)
    with caplog.at_level(logging.INFO):
        engine = LLMEngine.from_checkpoint(tiny, kernels, limits)
    (record,) = [record for record in caplog.records if "event=memory_planned" in record.getMessage()]
    assert f"workspace_bytes={WORKSPACE_BYTES} " in record.getMessage()
    assert f"kv_cache_blocks={engine.scheduler.block_manager.num_blocks} " in record.getMessage()
    used_bytes = kernels.used_bytes
    assert 0 <= 0.4 * kernels.total_bytes - used_bytes - (32 << 20) < 2 * BLOCK_BYTES
    for request, _, _ in requests:
        engine.add(request)
    run(engine)
    assert kernels.used_bytes == used_bytes


def test_more_blocks_than_the_sequences_can_fill_are_not_taken(tiny: Path, late: Late) -> None:
    engine = LLMEngine.from_checkpoint(tiny, late(), EngineLimits(kv_cache_bytes=None, max_num_sequences=3))
    assert engine.scheduler.block_manager.num_blocks == 3 * 256 // 64


@pytest.mark.parametrize(
    ("total_bytes", "kv_cache_bytes", "message"),
    [
        (34 << 20, None, "90% of 35651584 bytes of memory are to be used, .* one block takes"),
        (120 << 20, 100 << 20, "a KV cache of 104857600 bytes is asked for, .* are left"),
        (120 << 20, BLOCK_BYTES, "the least KV cache takes"),
        (1 << 20, None, "leave too little memory"),
    ],
)
def test_too_little_memory_is_an_error_at_start(
    tiny: Path, late: Late, total_bytes: int, kv_cache_bytes: int | None, message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        LLMEngine.from_checkpoint(tiny, late(total_bytes), EngineLimits(kv_cache_bytes, max_num_sequences=100))


@pytest.mark.parametrize(
    ("kv_cache_bytes", "message"),
    [
        (None, "must be given"),
        (1 << 50, "a KV cache of 1125899906842624 bytes is asked for, the machine has"),
        (BLOCK_BYTES, "the least KV cache takes"),
    ],
)
def test_more_than_the_machine_has_is_an_error_at_start_without_a_device(
    tiny: Path, kv_cache_bytes: int | None, message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        LLMEngine.from_checkpoint(tiny, CPUKernels(num_threads=1), EngineLimits(kv_cache_bytes))


def test_a_deadline_that_passes_while_a_step_is_under_way_ends_the_request_once(tiny: Path, late: Late) -> None:
    engine = LLMEngine.from_checkpoint(tiny, late(), EngineLimits(kv_cache_bytes=16 * BLOCK_BYTES))
    engine._now = lambda: 10.0
    request = GenerationRequest(
        request_id="a", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=9), arrival_s=0.0, deadline_s=11.0
    )
    engine.add(request)
    engine.step()
    (event,) = engine.step()
    assert event.index == 0
    engine._now = lambda: 12.0
    (event,) = engine.step()
    assert (event.index, event.token_ids, event.finish_reason) == (1, [], FinishReason.ERROR)
    assert not engine.has_unfinished
    assert engine.step() == []
