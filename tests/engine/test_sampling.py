"""Sampling parameters end to end in the engine: tokens and log probabilities against the model's own logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_logits import Logits, all_logits
from sampling_reference import adjusted, logprobs
from tiny_models import make_tiny_llama

from nibble.engine.errors import RequestError
from nibble.engine.limits import EngineLimits
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import (
    FinishReason,
    GenerationRequest,
    InvalidSampling,
    SamplingParams,
    TokenEvent,
    check_sampling,
)
from nibble.engine.sampling_params import slot_content
from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.interface import Mode
from nibble.kernels.layout import KVDtype
from nibble.kernels.slots import SlotContent, pack_mask

VOCAB_SIZE = 300
PROMPT = [5, 17, 5, 200, 31, 8, 8, 90, 91, 92, 17, 3]
TOLERANCE = 0.1  # of logits of magnitude 5: the engine computes prompts in another mode than the reference here


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(directory, vocab_size=VOCAB_SIZE, max_context_tokens=256)
    return directory


@pytest.fixture(scope="module")
def kernels() -> Iterator[CPUKernels]:
    backend = CPUKernels(num_threads=2)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def engine(tiny: Path, kernels: CPUKernels) -> LLMEngine:
    return LLMEngine.from_checkpoint(tiny, kernels, EngineLimits(kv_cache_bytes=8 << 20, max_num_sequences=8))


def request(request_id: str = "a", prompt: list[int] = PROMPT, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": 30, "temperature": 0.0, **sampling})
    return GenerationRequest(request_id=request_id, prompt_token_ids=prompt, sampling=params, arrival_s=0.0)


def run(engine: LLMEngine, *requests: GenerationRequest) -> list[TokenEvent]:
    events = []
    for item in requests:
        engine.add(item)
    while engine.has_unfinished:
        events += engine.step()
    return events


def tokens_of(events: list[TokenEvent], request_id: str = "a") -> list[int]:
    return [token_id for event in events if event.request_id == request_id for token_id in event.token_ids]


def logits_after(tiny: Path, kernels: CPUKernels, tokens: list[int]) -> Logits:
    """Logits that the generated tokens were drawn from."""
    ids = [*PROMPT, *tokens[:-1]]
    logits = all_logits(tiny, kernels, ids, KVDtype.INT8, Mode.DECODE, [len(ids)])
    return logits[len(PROMPT) - 1 :]


def records_of(records: bytes, num_logprobs: int) -> list[tuple[float, dict[int, float]]]:
    """(log probability of the token, those of the most probable ones) of each record."""
    rows = np.frombuffer(records, "<i4").reshape(-1, 1 + 2 * num_logprobs)
    return [
        (float(row[:1].view("<f4")[0]), dict(zip(row[1::2].tolist(), row[2::2].view("<f4").tolist(), strict=True)))
        for row in rows
    ]


ADJUSTED = {
    "none": {},
    "frequency": {"frequency_penalty": 1.1},
    "presence": {"presence_penalty": 2.0},
    "negative": {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    "repetition": {"repetition_penalty": 1.5},
    "logit_bias": {"logit_bias": ((7, 3.0), (8, 2.5), (9, -np.inf))},
    "allowed": {"allowed_token_ids": tuple(range(3, 300, 7))},
    "bad_words": {
        "allowed_token_ids": (1, 2, 3),
        "bad_words_token_ids": ((1, 1), (2, 2), (3, 3), (1, 2, 3), (3, 1, 2, 1)),
    },
    "min_tokens": {"logit_bias": ((2, 30.0),), "min_tokens": 20, "stop_token_ids": (2, 3)},
    "all": {
        "frequency_penalty": 0.4,
        "repetition_penalty": 0.8,
        "logit_bias": ((7, 3.0), (8, 2.5)),
        "allowed_token_ids": tuple(range(0, 300, 3)),
        "bad_words_token_ids": ((6,), (9, 12)),
    },
}


@pytest.mark.parametrize("name", ADJUSTED)
def test_greedy_tokens_are_the_best_of_the_adjusted_logits(
    tiny: Path, kernels: CPUKernels, engine: LLMEngine, name: str
) -> None:
    params = request(**ADJUSTED[name])
    tokens = tokens_of(run(engine, params))
    content = slot_content(params.sampling) or SlotContent()
    for i, logits in enumerate(logits_after(tiny, kernels, tokens)):
        expected = adjusted(logits, content, PROMPT, tokens[:i])
        assert expected[tokens[i]] > expected.max() - TOLERANCE
    if params.sampling.min_tokens:
        assert tokens[20:] == [2]


def test_parameters_change_what_is_generated(engine: LLMEngine) -> None:
    outputs = {name: tuple(tokens_of(run(engine, request(**params)))) for name, params in ADJUSTED.items()}
    assert len(set(outputs.values())) == len(ADJUSTED)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.3, "frequency_penalty": 1.0, "logit_bias": ((7, 5.0),)}])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_are_those_of_the_model_before_anything_else(
    tiny: Path, kernels: CPUKernels, engine: LLMEngine, count: int, params: dict[str, Any]
) -> None:
    events = run(engine, request(logprobs=count, **params), request("b", [1, 2], repetition_penalty=2.0))
    tokens = tokens_of(events)
    records = b"".join(event.logprobs or b"" for event in events if event.request_id == "a")
    assert all(event.logprobs is None for event in events if event.request_id == "b")
    assert tokens_of(run(engine, request(**params))) == tokens
    raw = [logprobs(row) for row in logits_after(tiny, kernels, tokens)]
    check_records(records_of(records, count), tokens, raw, count)


def check_records(
    records: list[tuple[float, dict[int, float]]], tokens: list[int], raw: list[npt.NDArray[np.float64]], count: int
) -> None:
    for (logprob, best), token, expected in zip(records, tokens, raw, strict=True):
        assert logprob == pytest.approx(expected[token], abs=TOLERANCE)
        assert list(best.values()) == sorted(best.values(), reverse=True)
        assert len(best) == count
        for token_id, value in best.items():
            assert value == pytest.approx(expected[token_id], abs=TOLERANCE)
        if count:
            assert min(best.values()) > np.sort(expected)[-count] - TOLERANCE
        if token in best:
            assert best[token] == logprob


@pytest.mark.parametrize("max_num_batched_tokens", [8, 512])
def test_prompt_logprobs_come_with_the_first_token_however_the_prompt_was_cut(
    tiny: Path, kernels: CPUKernels, max_num_batched_tokens: int
) -> None:
    limits = EngineLimits(8 << 20, max_num_sequences=3, max_num_batched_tokens=max_num_batched_tokens)
    engine = LLMEngine.from_checkpoint(tiny, kernels, limits)
    rng = np.random.default_rng(0)
    prompts = {name: rng.integers(0, VOCAB_SIZE, size).tolist() for name, size in (("a", 40), ("b", 25), ("c", 1))}
    wanted = {"a": 20, "b": 0, "c": 2}
    events = run(engine, *(request(name, prompts[name], prompt_logprobs=wanted[name]) for name in prompts))
    for name, prompt in prompts.items():
        first, *others = [event.prompt_logprobs for event in events if event.request_id == name]
        assert all(records is None for records in others)
        assert first is not None
        logits = all_logits(tiny, kernels, prompt, KVDtype.INT8, Mode.PREFILL, [len(prompt)])
        raw = [logprobs(row) for row in logits[:-1]]
        check_records(records_of(first, wanted[name]), prompt[1:], raw, wanted[name])


def test_a_prompt_whose_logprobs_are_wanted_is_computed_though_others_had_it(engine: LLMEngine) -> None:
    prompt = [*range(100)]
    (first, second) = (
        run(engine, request(name, prompt, prompt_logprobs=2, max_tokens=1))[0].prompt_logprobs for name in "ab"
    )
    assert first == second
    assert first is not None
    assert len(first) == 99 * 20
    (event,) = run(engine, request("c", prompt, repetition_penalty=1.5, max_tokens=1))
    assert event.metrics is not None
    assert event.metrics.cached_tokens == 64


def test_penalties_count_what_was_found_in_the_prefix_cache(engine: LLMEngine, tiny: Path, kernels: CPUKernels) -> None:
    prompt = [i % 7 for i in range(150)]
    params = {"repetition_penalty": 1.6, "frequency_penalty": 0.5, "max_tokens": 40}
    limits = EngineLimits(8 << 20, max_num_sequences=8, has_prefix_cache=False)
    alone = LLMEngine.from_checkpoint(tiny, kernels, limits)
    expected = tokens_of(run(alone, request("a", prompt, **params)))
    for _ in range(2):
        events = run(engine, request("a", prompt, **params))
        assert tokens_of(events) == expected
    assert events[-1].metrics is not None
    assert events[-1].metrics.cached_tokens == 128


def test_a_resumed_request_sends_no_prompt_logprobs_again(engine: LLMEngine) -> None:
    engine.add(request(prompt_logprobs=1), [4, 5])
    events = []
    while engine.has_unfinished:
        events += engine.step()
    assert all(event.prompt_logprobs is None for event in events)


def test_a_mask_of_the_host_decides_what_may_be_drawn(engine: LLMEngine) -> None:
    """Where constrained decoding will hand over what its grammar allows next."""
    engine.add(request(max_tokens=6))
    engine.add(request("b", [1, 2, 3], max_tokens=6, temperature=1.5))
    (sequence,) = [sequence for sequence in engine.scheduler.waiting if sequence.request_id == "a"]
    allowed = [7, 299, 31, 32, 64, 7]
    events = []
    for token_id in allowed:
        sequence.set_masks(pack_mask([token_id], VOCAB_SIZE)[None])
        events += engine.step()
    assert tokens_of(events) == allowed
    assert len(tokens_of(events, "b")) == 6


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_forbidden_is_never_generated(engine: LLMEngine, data: st.DataObject) -> None:
    ids = st.integers(0, VOCAB_SIZE - 1)
    banned = data.draw(st.lists(ids, max_size=50, unique=True))
    words = data.draw(st.lists(st.lists(ids, min_size=1, max_size=3), max_size=5))
    allowed = data.draw(st.none() | st.lists(ids, min_size=1, max_size=6, unique=True))
    if allowed is not None:  # pairs among so few tokens come up all the time
        words += [[a, b] for a in allowed for b in allowed[1:]][:10]
    stops = data.draw(st.lists(ids, max_size=4))
    params: dict[str, Any] = {
        "logit_bias": tuple((token_id, -np.inf) for token_id in banned),
        "bad_words_token_ids": tuple(map(tuple, words)),
        "allowed_token_ids": None if allowed is None else tuple(allowed),
        "stop_token_ids": tuple(stops),
        "min_tokens": data.draw(st.integers(0, 12)),
        "temperature": data.draw(st.sampled_from([0.0, 1.0, 5.0])),
        "seed": data.draw(st.integers(0, 2**64 - 1)),
        "frequency_penalty": data.draw(st.sampled_from([0.0, -2.0])),
        "max_tokens": 15,
    }
    item = request(**params)
    try:
        check_sampling(item.sampling, VOCAB_SIZE)
    except InvalidSampling:
        return
    events = run(engine, item)
    tokens = tokens_of(events)
    assert not set(tokens) & set(banned)
    assert allowed is None or set(tokens) <= set(allowed)
    for word in words:
        assert not any(tokens[i : i + len(word)] == word for i in range(len(tokens)))
    assert not set(tokens[: item.sampling.min_tokens]) & set(stops)
    is_stuck = events[-1].finish_reason is FinishReason.ERROR  # every allowed token would have ended a bad word
    assert is_stuck == (len(tokens) < 15 and not (tokens and tokens[-1] in stops))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logprobs": 21}, "logprobs is 21, the limits are 0 and 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, the limits are 0.01 and 100"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan, the limits are"),
        ({"logit_bias": ((300, 1.0),)}, "logit_bias has token id 300, outside the vocabulary of 300"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "names a token id twice"),
        ({"logit_bias": ((3, float("inf")),)}, "logit_bias of token id 3 is inf"),
        ({"logit_bias": ((3, 1e39),)}, "logit_bias of token id 3 is 1e\\+39"),
        ({"temperature": float("nan")}, "temperature is nan, the limits are 0.0 and 100.0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": 2**31}, "top_k is 2147483648, the limits are 0 and 2147483647"),
        ({"top_p": 0.0}, "top_p is 0.0, it must be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5, the limits are 0.0 and 1.0"),
        ({"seed": -1}, "seed is -1, the limits are 0 and 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 31}, "min_tokens is 31, more than max_tokens 30"),
        ({"min_tokens": 2**31, "max_tokens": 2**31}, "min_tokens is 2147483648"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "logit_bias has 1025 ids, the limit is 1024"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids has token id -1"),
        ({"allowed_token_ids": ()}, "leave no token to draw"),
        ({"allowed_token_ids": (3,), "logit_bias": ((3, -np.inf),)}, "leave no token to draw"),
        ({"allowed_token_ids": (3,), "min_tokens": 2, "stop_token_ids": (3,)}, "leave no token to draw"),
        ({"bad_words_token_ids": ((),)}, "empty word"),
        ({"bad_words_token_ids": (tuple(range(18)),)}, "18 ids in one word, the limit is 17"),
        ({"bad_words_token_ids": tuple((1, i) for i in range(300)) * 2}, "the limit is 1024"),
        ({"stop_token_ids": (300,)}, "stop_token_ids has token id 300"),
    ],
)
def test_what_cannot_be_done_is_refused(engine: LLMEngine, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.add(request(**params))
    assert not engine.has_unfinished
