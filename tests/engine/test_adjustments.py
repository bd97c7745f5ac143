"""Who has which slot, and what is in it, on a device that is late."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from late_kernels import LateKernels

from nibble.engine import adjustments
from nibble.engine.adjustments import Adjustments
from nibble.engine.protocol import GenerationRequest, SamplingParams
from nibble.engine.sequence import Sequence
from nibble.kernels.slots import SlotLayout, pack_mask

VOCAB_SIZE = 100
LAYOUT = SlotLayout(VOCAB_SIZE)


@pytest.fixture
def kernels() -> Iterator[LateKernels]:
    backend = LateKernels(num_threads=1)
    yield backend
    backend.close()


def sequence(name: str, num_generated: int = 3, **sampling: object) -> Sequence:
    rng = np.random.default_rng(int(name))
    params = SamplingParams(max_tokens=50, **sampling)  # type: ignore[arg-type] # of any field
    prompt = rng.integers(0, VOCAB_SIZE, 9).tolist()
    request = GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=params, arrival_s=0.0)
    return Sequence.start(request, rng.integers(0, VOCAB_SIZE, num_generated).tolist(), 256, 0.0)


def check_counts(kept: Adjustments, owner: Sequence, slot: int) -> None:
    """The slot has all tokens but the newest."""
    assert owner.slot_content is not None
    expected = np.zeros(LAYOUT.num_words, np.int32)
    known = owner.token_ids[: owner.num_tokens - 1]
    LAYOUT.write(expected, owner.slot_content, known[:9], known[9:])
    np.testing.assert_array_equal(LAYOUT.view(kept.slots[slot]).counts, LAYOUT.view(expected).counts)


def test_more_slots_than_the_buffer_has_room_for_wait_for_the_device(
    kernels: LateKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adjustments, "STAGED_SLOTS", 2)
    kept = Adjustments(kernels, 7, VOCAB_SIZE, 7)
    owners = [sequence(str(i), frequency_penalty=1.0) for i in range(7)]
    for turn in (0, 1, 0):
        kept.begin(turn)
        slots = [kept.slot_of(owner) for owner in owners]
        assert len(set(slots)) == 7
        for owner, slot in zip(owners, slots, strict=True):
            check_counts(kept, owner, slot)
        for owner in owners:  # two at once: no step does, so all slots are written anew
            owner.token_ids += [1, 2]


def test_a_slot_that_follows_its_sequence_is_not_written_again(kernels: LateKernels) -> None:
    kept = Adjustments(kernels, 2, VOCAB_SIZE, 2)
    owner = sequence("1", presence_penalty=1.0)
    kept.begin(0)
    slot = kept.slot_of(owner)
    kept.slots[slot] = 77  # as if the device had gone on
    owner.launched(1, 0)
    kept.begin(1)
    assert kept.slot_of(owner) == slot
    assert (kept.slots[slot] == 77).all()
    owner.append([5], 0.0)
    owner.num_computed_tokens = 0  # preempted, and nothing was sampled meanwhile
    owner.launched(12, 0)
    kept.begin(0)
    assert kept.slot_of(owner) == slot
    assert (kept.slots[slot] == 77).all()


def test_the_slot_that_was_not_used_for_longest_goes_to_a_new_sequence(kernels: LateKernels) -> None:
    kept = Adjustments(kernels, 3, VOCAB_SIZE, 3)
    first, second, third, fourth = (sequence(str(i), repetition_penalty=1.5) for i in range(4))
    kept.begin(0)
    slots = {owner.request_id: kept.slot_of(owner) for owner in (first, second, third)}
    kept.begin(1)
    for owner in (first, third):
        owner.token_ids.append(1)
        kept.slot_of(owner)
    assert kept.slot_of(fourth) == slots["1"]
    check_counts(kept, fourth, slots["1"])
    assert kept.slot_of(second) == slots["0"]
    check_counts(kept, second, slots["0"])


def test_min_tokens_alone_need_a_slot_until_they_are_reached(kernels: LateKernels) -> None:
    kept = Adjustments(kernels, 1, VOCAB_SIZE, 1)
    kept.begin(0)
    assert kept.slot_of(sequence("1", 3, min_tokens=4, stop_token_ids=(7,))) == 0
    assert kept.slot_of(sequence("1", 4, min_tokens=4, stop_token_ids=(7,))) == -1
    assert kept.slot_of(sequence("1", 3, min_tokens=4)) == -1
    assert kept.slot_of(sequence("1")) == -1
    assert sequence("1", 4, min_tokens=4, stop_token_ids=(7,)).samples_plainly


def test_masks_get_rows_in_the_order_of_sequences(kernels: LateKernels) -> None:
    kept = Adjustments(kernels, 4, VOCAB_SIZE, 4)
    owners = [sequence(str(i)) for i in range(3)]
    owners[0].set_masks(pack_mask([5], VOCAB_SIZE)[None])
    owners[2].set_masks(np.stack([pack_mask([6, 99], VOCAB_SIZE), pack_mask([7], VOCAB_SIZE)]))
    for turn in range(2):
        kept.begin(turn)
        samples = [(owners[0], 0), (owners[1], 0), (owners[2], 0), (owners[2], 1)]
        assert [kept.mask_row_of(*sample) for sample in samples] == [0, -1, 1, 2]
        kept.upload()
        np.testing.assert_array_equal(kept.masks[1:3], owners[2].token_masks)
        assert not owners[2].samples_plainly
