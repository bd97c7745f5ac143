"""Sampling on CUDA: the rule of interface.py row by row, within the rounding of weights, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import reference

from nibble.kernels.sampling import SamplingBatch

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu

VOCAB = 1003  # no multiple of 4: rows start at any alignment
COLUMNS = {
    "temperature": (1.0, np.float32),
    "top_k": (0, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
    "seeds": (0, np.uint64),
    "positions": (0, np.int64),
}
# Weights are rounded to 15 bits or more: relative to the running sum, cuts and draws may be off by this much.
EPSILON = 2.0**-15


def sampling_batch(rows: int, **columns: object) -> SamplingBatch:
    values = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(columns.get(name, value), dtype), rows))
        for name, (value, dtype) in COLUMNS.items()
    }
    return SamplingBatch(**values)


def take(batch: SamplingBatch, rows: Any) -> SamplingBatch:
    return SamplingBatch(**{name: np.ascontiguousarray(getattr(batch, name)[rows]) for name in COLUMNS})


def sample(kernels: CUDAKernels, logits: np.ndarray, batch: SamplingBatch) -> np.ndarray:
    on_device = SamplingBatch(**{f.name: kernels.to_device(getattr(batch, f.name)) for f in fields(batch)})
    with kernels.temporaries():
        tokens = kernels.to_host(kernels.sample(kernels.to_device(logits), on_device))
    assert tokens.dtype == np.int32
    return tokens


def may_be_drawn(logits: np.ndarray, batch: SamplingBatch, s: int, token: int) -> bool:
    """Whether some cuts and a u, each within EPSILON of the exact ones, draw the token."""
    if token < 0 or token >= len(logits) or not np.isfinite(logits[token]):
        return False
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / float(batch.temperature[s]))
    order = np.lexsort((np.arange(len(wide)), -wide))
    running = np.cumsum(weights[order])
    place = int(np.flatnonzero(order == token)[0])
    lowest = highest = float(running[-1])  # of the weight that the cuts leave
    top_k, top_p, min_p = int(batch.top_k[s]), float(batch.top_p[s]), float(batch.min_p[s])
    if top_k > 0:
        lowest = highest = float(running[min(top_k, len(order)) - 1])
    if top_p < 1:
        last = [
            min(int(np.searchsorted(running, bound * top_p)), len(order) - 1)
            for bound in (lowest * (1 - EPSILON), highest * (1 + EPSILON))
        ]
        lowest, highest = float(running[last[0]]), float(running[last[1]])
    if min_p > 0:
        above = [max(int((weights[order] >= min_p * bound).sum()), 1) - 1 for bound in (1 + EPSILON, 1 - EPSILON)]
        lowest, highest = min(lowest, float(running[above[0]])), min(highest, float(running[above[1]]))
    u = reference.philox_uniform(int(batch.seeds[s]), int(batch.positions[s]))
    start = float(running[place - 1]) if place else 0.0
    return start * (1 - EPSILON) <= u * highest and u * lowest <= float(running[place]) * (1 + EPSILON)


def random_batch(rng: np.random.Generator, rows: int, vocabulary: int) -> SamplingBatch:
    return sampling_batch(
        rows,
        temperature=rng.choice([0, 0.3, 1, 1.7], rows),
        top_k=rng.choice([0, 1, 5, 50, vocabulary, 5000], rows),
        top_p=rng.choice([1, 0.95, 0.5, 0.01], rows),
        min_p=rng.choice([0, 0.05, 0.5, 1], rows),
        seeds=rng.integers(0, 2**64, rows, dtype=np.uint64),
        positions=rng.integers(0, 2**40, rows),
    )


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(1, 10), (5, 60), (VOCAB, 300), (32_000, 40), (128_256, 24), (300_001, 12)]
)
def test_tokens_match_the_reference(
    kernels: CUDAKernels, rng: np.random.Generator, vocabulary: int, rows: int, spread: float
) -> None:
    logits = (rng.standard_normal((rows, vocabulary)) * spread).astype(np.float32)
    logits[::7] = np.round(logits[::7])  # many ties
    logits[::11, 1::3] = -np.inf
    batch = random_batch(rng, rows, vocabulary)
    expected = reference.sample(logits, batch)
    tokens = sample(kernels, logits, batch)
    different = np.flatnonzero(tokens != expected)
    assert len(different) <= 1 + rows // 50
    assert all(may_be_drawn(logits[s], batch, s, int(tokens[s])) for s in different)


def test_greedy_takes_the_smallest_id_of_the_largest_logit(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    for vocabulary in (VOCAB, 128_257):
        logits = rng.standard_normal((5, vocabulary)).astype(np.float32)
        logits[0, [5, 900]] = 10
        logits[1, vocabulary - 1] = 10
        logits[2] = -np.inf
        logits[2, 17] = -1e30
        logits[3] = 0
        logits[4] = -1
        logits[4, [3, 4]] = [-0.0, 0.0]
        tokens = sample(kernels, logits, sampling_batch(5, temperature=0))
        np.testing.assert_array_equal(tokens, [5, vocabulary - 1, 17, 0, 3])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_an_answer_gives_minus_one(
    kernels: CUDAKernels, rng: np.random.Generator, temperature: float
) -> None:
    logits = rng.standard_normal((5, VOCAB)).astype(np.float32)
    logits[0, 3] = np.nan
    logits[1, VOCAB - 1] = np.nan
    logits[2] = -np.inf
    logits[3, 8] = np.inf
    tokens = sample(kernels, logits, sampling_batch(5, temperature=temperature))
    np.testing.assert_array_equal(tokens[:4], -1)
    assert 0 <= tokens[4] < VOCAB


def test_one_finite_logit_is_always_drawn(kernels: CUDAKernels) -> None:
    logits = np.full((50, VOCAB), -np.inf, np.float32)
    logits[:, 700] = 3
    tokens = sample(kernels, logits, sampling_batch(50, positions=np.arange(50), top_p=0.9))
    np.testing.assert_array_equal(tokens, 700)


def test_extreme_temperatures(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((200, VOCAB)).astype(np.float32)
    cold = sample(kernels, logits, sampling_batch(200, temperature=1e-30, positions=np.arange(200)))
    np.testing.assert_array_equal(cold, logits.argmax(axis=1))
    hot_batch = sampling_batch(200, temperature=1e30, positions=np.arange(200))
    hot = sample(kernels, logits, hot_batch)
    uniform = [int(reference.philox_uniform(0, s) * VOCAB) for s in range(200)]  # the place in order of falling logit
    order = np.argsort(-logits, axis=1, kind="stable")
    np.testing.assert_array_equal(hot, order[np.arange(200), uniform])


@pytest.mark.parametrize("vocabulary", [VOCAB, 128_256])
def test_ties_are_drawn_in_order_of_ids(kernels: CUDAKernels, vocabulary: int) -> None:
    logits = np.zeros((30, vocabulary), np.float32)
    batch = sampling_batch(30, positions=np.arange(30), top_k=np.arange(30) % 3 * 200)
    expected = reference.sample(logits, batch)
    assert (np.abs(sample(kernels, logits, batch) - expected) <= 1).all()  # u may fall on a bound


@pytest.mark.parametrize("columns", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_narrowest_cut_leaves_the_best(
    kernels: CUDAKernels, rng: np.random.Generator, columns: dict[str, float]
) -> None:
    logits = rng.standard_normal((100, VOCAB)).astype(np.float32)
    tokens = sample(kernels, logits, sampling_batch(100, positions=np.arange(100), **columns))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_row_does_not_depend_on_the_batch(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((70, 5003)) * 2).astype(np.float32)
    batch = random_batch(rng, 70, 5003)
    tokens = sample(kernels, logits, batch)
    for rows in (np.arange(70)[::-1], np.arange(33, 50), np.array([7]), np.arange(1, 70, 3)):
        np.testing.assert_array_equal(
            sample(kernels, np.ascontiguousarray(logits[rows]), take(batch, rows)), tokens[rows]
        )


def test_draws_follow_the_distribution(kernels: CUDAKernels) -> None:
    num_draws, num_tokens = 20_000, 12
    logits = np.log(np.arange(1, num_tokens + 1, dtype=np.float32))
    batch = sampling_batch(num_draws, seeds=123, positions=np.arange(num_draws))
    tokens = sample(kernels, np.repeat(logits[None], num_draws, axis=0), batch)
    observed = np.bincount(tokens, minlength=num_tokens)
    expected = np.arange(1, num_tokens + 1) / np.arange(1, num_tokens + 1).sum() * num_draws
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom: exceeded with probability 0.001, and the draws are fixed


def test_random_words_match_the_reference(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    """With 4096 equal logits a token is the upper 12 bits of the word."""
    rows = 200
    seeds, positions = rng.integers(0, 2**64, rows, dtype=np.uint64), rng.integers(0, 2**63, rows)
    batch = sampling_batch(rows, seeds=seeds, positions=positions)
    tokens = sample(kernels, np.zeros((rows, 4096), np.float32), batch)
    expected = [
        int(reference.philox_uniform(int(seed), int(p)) * 4096) for seed, p in zip(seeds, positions, strict=True)
    ]
    np.testing.assert_array_equal(tokens, expected)


def test_replayed_graph_gives_the_same(
    kernels: CUDAKernels, rng: np.random.Generator, replay: Callable[[Callable[[], None]], None]
) -> None:
    logits = (rng.standard_normal((9, 32_001)) * 2).astype(np.float32)
    batch = random_batch(rng, 9, 32_001)
    expected = sample(kernels, logits, batch)
    device_logits = kernels.to_device(logits)
    on_device = SamplingBatch(**{f.name: kernels.to_device(getattr(batch, f.name)) for f in fields(batch)})
    results: list[Any] = []
    replay(lambda: results.append(kernels.sample(device_logits, on_device)))
    np.testing.assert_array_equal(kernels.to_host(results[-1]), expected)


def test_no_rows(kernels: CUDAKernels) -> None:
    batch = SamplingBatch(**{name: kernels.zeros((0,), dtype) for name, (_, dtype) in COLUMNS.items()})
    assert kernels.sample(kernels.zeros((0, VOCAB), np.float32), batch).shape == (0,)
