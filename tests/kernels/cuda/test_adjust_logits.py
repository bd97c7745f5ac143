"""Penalties, biases, bans, masks and log probabilities on CUDA: as on the CPU, also in a graph that is run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from adjusting import Case, adjustment, batch_of, random_case, slots_of
from sampling_reference import adjusted, logprobs

from nibble.kernels.sampling import LOGPROB_WORDS
from nibble.kernels.slots import MAX_COUNT, SlotContent, SlotLayout, pack_mask

if TYPE_CHECKING:
    from nibble.kernels.cuda.backend import CUDAKernels

pytestmark = pytest.mark.gpu

VOCABULARIES = [1, 31, 515, 1003, 32_000, 128_256]


@pytest.mark.parametrize("vocab_size", [3, 31, 515, 1003])
def test_rows_are_adjusted_by_their_slots_and_the_others_stay(
    kernels: CUDAKernels, rng: np.random.Generator, vocab_size: int
) -> None:
    cases = [random_case(rng, vocab_size) for _ in range(60)]
    order = rng.permutation(60)
    slots = kernels.to_device(slots_of(cases, vocab_size, order, rng))
    present: list[Case | None] = [case if i % 7 else None for i, case in enumerate(cases)]
    logits = rng.normal(0, 4, (60, vocab_size)).astype(np.float32)
    expected = [
        row if case is None else adjusted(row, case.content, case.prompt, case.generated)
        for row, case in zip(logits, present, strict=True)
    ]
    arrays = {name: kernels.to_device(array) for name, array in batch_of(present, order, rng).items()}
    on_device = kernels.to_device(logits)
    kernels.adjust_logits(on_device, slots, adjustment(arrays))
    np.testing.assert_allclose(kernels.to_host(on_device), np.array(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [1003, 128_256])
def test_a_slot_follows_its_sequence(kernels: CUDAKernels, rng: np.random.Generator, vocab_size: int) -> None:
    """Token by token from the prompt on; a newest token at any part's border is counted once."""
    layout, content = SlotLayout(vocab_size), SlotContent(frequency=0.5, repetition=1.2, bad_words=[[1, 2, 3]])
    part = -(-vocab_size // (32 * 16)) * 32
    borders = [token for p in range(1, 16) for token in (part * p - 1, part * p) if token < vocab_size]
    prompt, generated = [4, 4, 5, 9], [0, vocab_size - 1, *borders, 1, 2, 2, 2, *rng.integers(0, 99, 20).tolist()]
    host = np.zeros((2, layout.num_words), np.int32)
    layout.write(host[1], content, prompt[:-1], [])
    followed = kernels.to_device(host)
    for length in range(len(generated) + 1):
        case = Case(content, prompt, generated[:length])
        arrays = {k: kernels.to_device(v) for k, v in batch_of([case], np.array([1]), rng).items()}
        logits = rng.normal(size=(1, vocab_size)).astype(np.float32)
        on_device = kernels.to_device(logits)
        kernels.adjust_logits(on_device, followed, adjustment(arrays))
        if length % 9 == 0:
            expected = host.copy()
            layout.write(expected[1], content, prompt, generated[:length])
            slot = kernels.to_host(followed)
            np.testing.assert_array_equal(layout.view(slot[1]).counts, layout.view(expected[1]).counts)
            if length >= 16:
                np.testing.assert_array_equal(layout.view(slot[1]).recent, layout.view(expected[1]).recent)
            assert not slot[0].any()


def test_a_graph_adds_one_token_each_time_it_is_run(
    kernels: CUDAKernels, rng: np.random.Generator, replay: Callable[[Callable[[], None]], None]
) -> None:
    layout = SlotLayout(1003)
    host = np.zeros((1, layout.num_words), np.int32)
    layout.write(host[0], SlotContent(presence=1.0), [], [MAX_COUNT * 0] * 3)
    slots, logits = kernels.to_device(host), kernels.zeros((1, 1003), np.float32)
    case = Case(SlotContent(), [1], [0] * 3 + [5])
    arrays = {k: kernels.to_device(v) for k, v in batch_of([case], np.array([0]), rng).items()}
    kernels.adjust_logits(logits, slots, adjustment(arrays))
    before = layout.view(kernels.to_host(slots)[0]).counts[5]
    replay(lambda: kernels.adjust_logits(logits, slots, adjustment(arrays)))
    counts = layout.view(kernels.to_host(slots)[0]).counts
    assert (before, counts[0]) == (1, 3)
    assert counts[5] > 2


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_masks_forbid_what_their_bits_do_not_allow(
    kernels: CUDAKernels, rng: np.random.Generator, vocab_size: int
) -> None:
    allowed = rng.random((3, vocab_size)) < 0.5
    masks = np.array([pack_mask(np.flatnonzero(row).tolist(), vocab_size) for row in allowed])
    logits = rng.normal(size=(5, vocab_size)).astype(np.float32)
    mask_rows = np.array([2, -1, 0, 2, -5], np.int32)
    expected = np.where([allowed[i] if i >= 0 else np.ones(vocab_size, bool) for i in mask_rows], logits, -np.inf)
    on_device = kernels.to_device(logits)
    kernels.mask_logits(on_device, kernels.to_device(masks), kernels.to_device(mask_rows))
    np.testing.assert_array_equal(kernels.to_host(on_device), expected)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 5.0])
@pytest.mark.parametrize("vocab_size", [*VOCABULARIES, 300_001])
def test_logprobs(kernels: CUDAKernels, rng: np.random.Generator, vocab_size: int, spread: float) -> None:
    """Also where all logits are equal: then the smallest ids are named."""
    logits = (rng.normal(size=(8, vocab_size)) * spread).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, ::3] = -np.inf
    logits[2, 0] = 1
    logits[6, : vocab_size // 2] += 30  # all of the best in one half
    ids = rng.integers(0, vocab_size, 8).astype(np.int32)
    ids[5] = -1
    wanted = np.array([0, 20, 5, -1, 3, 3, 20, 1], np.int32)
    out_rows = np.array([3, 0, 9, 1, -1, 4, 5, 7], np.int32)
    columns = [kernels.to_device(column) for column in (ids, wanted)]
    out = kernels.to_device(np.full((10, LOGPROB_WORDS), 77, np.int32))
    kernels.logprobs(kernels.to_device(logits), *columns, out, kernels.to_device(out_rows))
    words = kernels.to_host(out)
    untouched = set(range(10)) - {3, 0, 9, 5, 7}
    assert (words[sorted(untouched)] == 77).all()
    for row in (0, 1, 2, 6, 7):
        check_logprobs(logits[row], int(ids[row]), int(wanted[row]), words[out_rows[row]])


def check_logprobs(logits: np.ndarray, token_id: int, count: int, words: np.ndarray) -> None:
    expected = logprobs(logits)
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    missing = [-1] * (count - len(order))
    assert words[1 : 1 + 2 * count : 2].tolist() == [*order.tolist(), *missing]
    values = np.append(words[:1], words[2 : 2 + 2 * count : 2]).view(np.float32)
    # ex2 and lg2 err by 2^-22; a thread adds 300 weights at most, then trees of 5 and 5
    np.testing.assert_allclose(
        values, [expected[token_id], *expected[order], *(-np.inf for _ in missing)], rtol=2e-6, atol=3e-5
    )


def test_logprobs_of_a_row_do_not_depend_on_the_batch(kernels: CUDAKernels, rng: np.random.Generator) -> None:
    logits = rng.normal(0, 3, (70, 5003)).astype(np.float32)
    ids, wanted = np.arange(70, dtype=np.int32), np.full(70, 20, np.int32)

    def run(rows: np.ndarray) -> np.ndarray:
        columns = [kernels.to_device(column[rows]) for column in (ids, wanted)]
        out = kernels.zeros((len(rows), LOGPROB_WORDS), np.int32)
        places = kernels.to_device(np.arange(len(rows), dtype=np.int32))
        kernels.logprobs(kernels.to_device(np.ascontiguousarray(logits[rows])), *columns, out, places)
        return kernels.to_host(out)

    together = run(np.arange(70))
    for rows in (np.arange(70)[::-1], np.array([7]), np.arange(1, 70, 3)):
        np.testing.assert_array_equal(run(rows), together[rows])


@pytest.mark.parametrize("columns", [1, 4, 1003, 128_256])
def test_copy_rows_copies_what_is_wanted(kernels: CUDAKernels, rng: np.random.Generator, columns: int) -> None:
    x = rng.normal(size=(5, columns)).astype(np.float32)
    wanted = np.array([0, -1, 20, -1, 3], np.int32)
    out = kernels.to_host(kernels.copy_rows(kernels.to_device(x), kernels.to_device(wanted)))
    np.testing.assert_array_equal(out[wanted >= 0], x[wanted >= 0])
    assert not (out[wanted < 0] == x[wanted < 0]).any()
