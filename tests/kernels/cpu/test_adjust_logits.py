"""Penalties, biases, bans, masks and log probabilities against plain numpy over whole token lists."""

from __future__ import annotations

import numpy as np
import pytest
from adjusting import Case, adjustment, batch_of, random_case, slots_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import adjusted, logprobs

from nibble.kernels.cpu.backend import CPUKernels
from nibble.kernels.sampling import LOGPROB_WORDS, MAX_LOGPROBS
from nibble.kernels.slots import IN_PROMPT, MAX_COUNT, SlotContent, SlotLayout, mask_words, pack_mask, unpack_mask

VOCAB = 103


@pytest.mark.parametrize("vocab_size", [VOCAB, 64, 1003])
def test_rows_are_adjusted_by_their_slots_and_the_others_stay(
    kernels: CPUKernels, rng: np.random.Generator, vocab_size: int
) -> None:
    cases = [random_case(rng, vocab_size) for _ in range(60)]
    order = rng.permutation(60)
    slots = slots_of(cases, vocab_size, order, rng)
    present: list[Case | None] = [case if i % 7 else None for i, case in enumerate(cases)]
    logits = rng.normal(0, 4, (60, vocab_size)).astype(np.float32)
    expected = [
        row if case is None else adjusted(row, case.content, case.prompt, case.generated)
        for row, case in zip(logits, present, strict=True)
    ]
    kernels.adjust_logits(logits, slots, adjustment(batch_of(present, order, rng)))
    np.testing.assert_allclose(logits, np.array(expected), rtol=1e-5, atol=1e-5)


def test_a_slot_that_followed_its_sequence_is_the_one_written_anew(
    kernels: CPUKernels, rng: np.random.Generator
) -> None:
    """Token by token from the prompt on, and rebuilt at any point, as after a preemption."""
    layout, content = SlotLayout(VOCAB), SlotContent(frequency=0.5, bad_words=[[1, 2, 3]])
    prompt, generated = rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, 9, 50).tolist()
    followed = np.zeros((1, layout.num_words), np.int32)
    layout.write(followed[0], content, prompt[:-1], [])
    for length in range(51):
        case = Case(content, prompt, generated[:length])
        batch = adjustment(batch_of([case], np.array([0]), rng))
        anew = np.zeros_like(followed)
        layout.write(anew[0], content, *case.before)
        rows = rng.normal(size=(1, VOCAB)).astype(np.float32).repeat(2, axis=0)
        kernels.adjust_logits(rows[:1], followed, batch)
        kernels.adjust_logits(rows[1:], anew, batch)
        np.testing.assert_array_equal(rows[0], rows[1])
        np.testing.assert_array_equal(layout.view(followed[0]).counts, layout.view(anew[0]).counts)


def test_a_count_does_not_run_into_the_bit_of_the_prompt(kernels: CPUKernels, rng: np.random.Generator) -> None:
    layout, content = SlotLayout(VOCAB), SlotContent(frequency=0.001)
    slots = np.zeros((1, layout.num_words), np.int32)
    layout.write(slots[0], content, [7], [5] * (MAX_COUNT + 10))
    case = Case(content, [7], [5] * (MAX_COUNT + 11))
    kernels.adjust_logits(np.zeros((1, VOCAB), np.float32), slots, adjustment(batch_of([case], np.array([0]), rng)))
    counts = layout.view(slots[0]).counts
    assert (counts[5], counts[7], np.count_nonzero(counts)) == (MAX_COUNT, IN_PROMPT, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200))
def test_what_is_forbidden_is_minus_infinity(kernels: CPUKernels, seed: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, vocab_size + 2)
    logits = rng.normal(0, 30, (1, vocab_size + 2)).astype(np.float32)
    expected = adjusted(logits[0], case.content, case.prompt, case.generated)
    slots = slots_of([case], vocab_size + 2, np.array([0]), rng)
    kernels.adjust_logits(logits, slots, adjustment(batch_of([case], np.array([0]), rng)))
    np.testing.assert_array_equal(np.isneginf(logits[0]), np.isneginf(expected))
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1003])
def test_masks_forbid_what_their_bits_do_not_allow(
    kernels: CPUKernels, rng: np.random.Generator, vocab_size: int
) -> None:
    allowed = rng.random((3, vocab_size)) < 0.5
    masks = np.array([pack_mask(np.flatnonzero(row).tolist(), vocab_size) for row in allowed])
    assert masks.shape == (3, mask_words(vocab_size))
    np.testing.assert_array_equal([unpack_mask(mask, vocab_size) for mask in masks], allowed)
    logits = rng.normal(size=(5, vocab_size)).astype(np.float32)
    mask_rows = np.array([2, -1, 0, 2, -5], np.int32)
    expected = np.where([allowed[i] if i >= 0 else np.ones(vocab_size, bool) for i in mask_rows], logits, -np.inf)
    kernels.mask_logits(logits, masks, mask_rows)
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("vocab_size", [1, 7, 20, 1003])
def test_logprobs(kernels: CPUKernels, rng: np.random.Generator, vocab_size: int) -> None:
    logits = rng.normal(0, 5, (8, vocab_size)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2, ::3] = -np.inf
    logits[2, 0] = 1
    ids = rng.integers(0, vocab_size, 8).astype(np.int32)
    ids[5] = -1
    wanted = np.array([0, 20, 5, -1, 3, 3, 3, 1], np.int32)
    out_rows = np.array([3, 0, 9, 1, -1, 4, 5, 7], np.int32)
    out = np.full((10, LOGPROB_WORDS), 77, np.int32)
    kernels.logprobs(logits, ids, wanted, out, out_rows)
    untouched = set(range(10)) - {3, 0, 9, 5, 7}
    assert (out[sorted(untouched)] == 77).all()
    for row in (0, 1, 2, 6, 7):
        check_logprobs(logits[row], int(ids[row]), int(wanted[row]), out[out_rows[row]])
        assert (out[out_rows[row], 1 + 2 * wanted[row] :] == 77).all()


def check_logprobs(logits: np.ndarray, token_id: int, count: int, words: np.ndarray) -> None:
    assert count <= MAX_LOGPROBS
    expected = logprobs(logits)
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    missing = [-1] * (count - len(order))
    assert words[1 : 1 + 2 * count : 2].tolist() == [*order.tolist(), *missing]
    values = np.append(words[:1], words[2 : 2 + 2 * count : 2]).view(np.float32)
    np.testing.assert_allclose(
        values, [expected[token_id], *expected[order], *(-np.inf for _ in missing)], rtol=1e-6, atol=2e-6
    )


def test_copy_rows_copies_what_is_wanted(kernels: CPUKernels, rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, VOCAB)).astype(np.float32)
    wanted = np.array([0, -1, 20, -1, 3], np.int32)
    out = kernels.copy_rows(x, wanted)
    np.testing.assert_array_equal(out[wanted >= 0], x[wanted >= 0])
    x[0] = 0
    assert out[0].any()
