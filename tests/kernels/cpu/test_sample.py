"""Sampling: the rule of interface.py row by row, the random words, and the distribution that comes out."""

from __future__ import annotations

import numpy as np
import pytest
import reference

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.cpu.jit import kernel_jit
from nibble.kernels.cpu.sample import philox_word
from nibble.kernels.sampling import SamplingBatch

VOCAB = 1003  # no multiple of 16


@kernel_jit
def compiled_word(seed, position):
    return philox_word(seed, position)


def sampling_batch(rows: int, **columns: object) -> SamplingBatch:
    defaults: dict[str, tuple[object, type]] = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seeds": (0, np.uint64),
        "positions": (0, np.int64),
    }
    values = {
        name: np.ascontiguousarray(np.broadcast_to(np.asarray(columns.get(name, value), dtype), rows))
        for name, (value, dtype) in defaults.items()
    }
    return SamplingBatch(**values)


# Random123's known answers for philox4x32-10: (counter, key, first word). The last two counter words are 0 in sampling.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_reference_philox_gives_the_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert reference.philox(counter, key) == words


def test_compiled_philox_matches_the_reference(rng: np.random.Generator) -> None:
    assert int(compiled_word(np.uint64(0), np.uint64(0))) == 0x6627E8D5
    for seed, position in rng.integers(0, 2**63, (50, 2)):
        expected = reference.philox(
            [int(position) & 0xFFFFFFFF, int(position) >> 32, 0, 0], [int(seed) & 0xFFFFFFFF, int(seed) >> 32]
        )
        assert int(compiled_word(np.uint64(seed), np.uint64(position))) == expected[0]


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
def test_tokens_match_the_reference(kernels: CPUKernels, rng: np.random.Generator, spread: float) -> None:
    rows = 300
    logits = (rng.standard_normal((rows, VOCAB)) * spread).astype(np.float32)
    logits[::7] = np.round(logits[::7])  # many ties
    logits[::11, ::3] = -np.inf
    batch = sampling_batch(
        rows,
        temperature=rng.choice([0, 0.3, 1, 1.7], rows),
        top_k=rng.choice([0, 1, 5, 50, VOCAB, 5000], rows),
        top_p=rng.choice([1, 0.95, 0.5, 0.01], rows),
        min_p=rng.choice([0, 0.05, 0.5, 1], rows),
        seeds=rng.integers(0, 2**64, rows, dtype=np.uint64),
        positions=rng.integers(0, 2**40, rows),
    )
    expected = reference.sample(logits, batch)
    tokens = kernels.sample(logits.copy(), batch)
    assert tokens.dtype == np.int32
    # The reference's weights are fp64: u falls between the two roundings of a running sum about once in 10^6 draws,
    # and a cut (top_p, min_p) on a run of ties may take one more or less of it.
    assert (tokens != expected).sum() <= 2


def test_greedy_takes_the_smallest_id_of_the_largest_logit(kernels: CPUKernels, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((4, VOCAB)).astype(np.float32)
    logits[0, [5, 900]] = 10
    logits[1, VOCAB - 1] = 10
    logits[2] = -np.inf
    logits[2, 17] = -1e30
    logits[3] = 0
    tokens = kernels.sample(logits, sampling_batch(4, temperature=0))
    np.testing.assert_array_equal(tokens, [5, VOCAB - 1, 17, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_without_an_answer_gives_minus_one(
    kernels: CPUKernels, rng: np.random.Generator, temperature: float
) -> None:
    logits = rng.standard_normal((5, VOCAB)).astype(np.float32)
    logits[0, 3] = np.nan
    logits[1, VOCAB - 1] = np.nan
    logits[2] = -np.inf
    logits[3, 8] = np.inf
    tokens = kernels.sample(logits, sampling_batch(5, temperature=temperature))
    np.testing.assert_array_equal(tokens[:4], -1)
    assert 0 <= tokens[4] < VOCAB


def test_same_seed_and_position_draw_the_same_token_in_any_batch(kernels: CPUKernels, rng: np.random.Generator) -> None:
    logits = rng.standard_normal((1, VOCAB)).astype(np.float32)
    alone = kernels.sample(logits.copy(), sampling_batch(1, seeds=5, positions=3))
    many = kernels.sample(np.repeat(logits, 9, axis=0), sampling_batch(9, seeds=5, positions=3))
    np.testing.assert_array_equal(many, alone[0])


def test_draws_follow_the_distribution(kernels: CPUKernels) -> None:
    num_draws, num_tokens = 20_000, 12
    logits = np.log(np.arange(1, num_tokens + 1, dtype=np.float32))
    batch = sampling_batch(num_draws, seeds=123, positions=np.arange(num_draws))
    tokens = kernels.sample(np.repeat(logits[None], num_draws, axis=0), batch)
    observed = np.bincount(tokens, minlength=num_tokens)
    expected = np.arange(1, num_tokens + 1) / np.arange(1, num_tokens + 1).sum() * num_draws
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom: exceeded with probability 0.001, and the draws are fixed


def test_top_p_keeps_the_shortest_prefix(kernels: CPUKernels) -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    for top_p, kept in ((0.45, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        batch = sampling_batch(2000, top_p=top_p, positions=np.arange(2000))
        tokens = kernels.sample(np.repeat(logits, 2000, axis=0), batch)
        assert set(tokens.tolist()) == set(range(kept))


def test_min_p_is_relative_to_the_largest(kernels: CPUKernels) -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    tokens = kernels.sample(
        np.repeat(logits, 2000, axis=0), sampling_batch(2000, min_p=0.25, positions=np.arange(2000))
    )
    assert set(tokens.tolist()) == {0, 1, 2}
