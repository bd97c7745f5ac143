"""What the parameters of a request leave, told without a device: the same as the kernel that forbids tokens leaves."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nibble.engine.protocol import SamplingParams
from nibble.engine.sampling_params import slot_content
from nibble.grammar.bans import exhausting_fields, has_bans
from nibble.kernels.cpu.adjust_logits import adjust_logits
from nibble.kernels.sampling import AdjustmentBatch
from nibble.kernels.slots import SlotLayout

VOCAB_SIZE = 8
LAYOUT = SlotLayout(VOCAB_SIZE)
token_ids = st.integers(0, VOCAB_SIZE - 1)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.just(20),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.lists(token_ids, max_size=3, unique=True).map(tuple),
    logit_bias=st.dictionaries(token_ids, st.sampled_from([-math.inf, -100.0, 3.0]), max_size=6).map(
        lambda biases: tuple(biases.items())
    ),
    allowed_token_ids=st.none() | st.lists(token_ids, min_size=1, max_size=4).map(tuple),
    bad_words_token_ids=st.lists(st.lists(token_ids, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
)


def left_by_kernel(sampling: SamplingParams, generated: list[int]) -> np.ndarray:
    content, prompt = slot_content(sampling), [1, 5]
    if content is None:
        return np.ones(VOCAB_SIZE, bool)
    slots = np.zeros((1, LAYOUT.num_words), np.int32)
    tokens = [*prompt, *generated]
    LAYOUT.write(slots[0], content, tokens[:-1][:2], tokens[:-1][2:])
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    first = np.zeros(1, np.int32)
    batch = AdjustmentBatch(
        slots=first, positions=np.array([len(generated)], np.int32), ids=np.array(tokens[-1:], np.int32), rows=first
    )
    adjust_logits(logits, slots, batch)
    return logits[0] > -np.inf


@given(samplings, st.lists(token_ids, max_size=5), st.sets(token_ids, min_size=1))
def test_the_kernel_leaves_the_same(sampling: SamplingParams, generated: list[int], allowed_ids: set[int]) -> None:
    allowed = np.isin(np.arange(VOCAB_SIZE), list(allowed_ids))
    left = allowed & left_by_kernel(sampling, generated)
    fields = exhausting_fields(sampling, generated, allowed)
    assert bool(fields) == (not left.any())
    assert has_bans(sampling) or not fields


def test_only_the_fields_that_take_part_are_named() -> None:
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=(1, 7),
        allowed_token_ids=(1, 2, 3),
        logit_bias=((2, -math.inf), (3, 5.0), (6, -math.inf)),
        bad_words_token_ids=((4, 3), (5,)),
    )

    def fields(generated: list[int], *allowed: int) -> tuple[str, ...]:
        return exhausting_fields(sampling, generated, np.isin(np.arange(VOCAB_SIZE), allowed))

    assert fields([], 2) == ("logit_bias",)
    assert fields([], 0, 1) == ("allowed_token_ids", "min_tokens")
    assert fields([0, 0], 0, 1) == ()
    assert fields([4], 3) == ("bad_words_token_ids",)
    assert fields([4], 2, 3) == ("bad_words_token_ids", "logit_bias")
    assert fields([], 2, 3) == ()
