"""What adjusts logits, on the device: a slot for each sequence that needs one, and masks for one step.

A slot holds a sequence's tokens up to a length (`kernels/slots.py`), and every step that samples adds one, on the
device. So nothing has to be told when a sequence ends, is preempted or comes back: a slot that holds all tokens but the
newest is right, and any other is written anew from the token list, unless no adjustment depends on tokens. The one that
was not used for longest is given away first.

A step that verifies drafts samples several tokens of a sequence over one slot. Each of them would have to see the
drafts before it, and the slot none of those that turn out to be wrong: that is why sequences have no drafts where
adjustments depend on tokens. Others depend on the index of the token alone, which each row has.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nibble.engine.sequence import Sequence
from nibble.kernels.interface import Kernels
from nibble.kernels.slots import SlotContent, SlotLayout, mask_words

NUM_HOST_BUFFERS = 2  # as the runner's: one is filled while the copy of the other may still be under way
STAGED_SLOTS = 32  # whole ones that a step can write before it has to wait for the device


@dataclass(slots=True)
class _Tenancy:
    slot: int
    num_tokens: int  # that the slot holds once the steps launched so far have finished


class Adjustments:
    """Buffers of one runner, and who has which slot."""

    def __init__(self, kernels: Kernels, max_sequences: int, vocab_size: int, max_masks: int) -> None:
        """max_masks: tokens that a step samples at most."""
        self._kernels = kernels
        self._layout = SlotLayout(vocab_size)
        num_words, num_mask_words = self._layout.num_words, mask_words(vocab_size)
        self.slots = kernels.zeros((max_sequences, num_words), np.int32)
        self.masks = kernels.zeros((max_masks, num_mask_words), np.int32)
        num_staged = min(STAGED_SLOTS, max_sequences)
        shape = (NUM_HOST_BUFFERS, num_staged * num_words)
        self._staged_slots = kernels.host_buffer(shape, np.int32)
        self._staged_masks = kernels.host_buffer((NUM_HOST_BUFFERS, max_masks, num_mask_words), np.int32)
        self.wants_logprobs = False  # whether a sequence of this step does
        self._turn = 0
        self._num_words = 0  # of this turn's staged slots in use
        self._num_masks = 0
        self._free = list(range(max_sequences))
        self._tenancies: OrderedDict[Sequence, _Tenancy] = OrderedDict()  # the least recently used first

    def begin(self, turn: int) -> None:
        """A step is about to be prepared, with the host buffers of this turn."""
        self._turn, self._num_words, self._num_masks = turn, 0, 0
        self.wants_logprobs = False

    def slot_of(self, sequence: Sequence) -> int:
        """Where the step to be launched finds, and adds to, what it needs of a sequence that samples; -1: nothing."""
        if not sequence.needs_slot:
            return -1
        tenancy = self._tenancies.get(sequence)
        if tenancy is None:
            tenancy = self._tenancies[sequence] = _Tenancy(self._take_slot(), -1)
        self._tenancies.move_to_end(sequence)
        content = sequence.slot_content
        assert content is not None, "a sequence without slot content needs no slot"
        if tenancy.num_tokens < 0 or (content.depends_on_tokens and tenancy.num_tokens != sequence.num_tokens - 1):
            self._load(tenancy.slot, sequence, content)
        tenancy.num_tokens = sequence.num_tokens
        return tenancy.slot

    def mask_row_of(self, sequence: Sequence, index: int) -> int:
        """The row of `masks` that will have the sequence's mask of this index; -1: it has none."""
        if sequence.token_masks is None:
            return -1
        self._staged_masks[self._turn, self._num_masks] = sequence.token_masks[index]
        self._num_masks += 1
        return self._num_masks - 1

    def upload(self) -> None:
        """Bring the step's masks to the device, behind the steps launched before. Slots are on their way already."""
        count = self._num_masks
        if count:
            self._kernels.copy_to_device(self._staged_masks[self._turn, :count], self.masks[:count])

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        return self._tenancies.popitem(last=False)[1].slot

    def _load(self, slot: int, sequence: Sequence, content: SlotContent) -> None:
        """Write all of the sequence's tokens but the newest, which is the only one that may be unread."""
        known = sequence.token_ids[: sequence.num_tokens - 1]
        used = self._layout.used_words(content)
        whole = self._stage()
        num_prompt_tokens = sequence.num_prompt_tokens
        self._layout.write(whole, content, known[:num_prompt_tokens], known[num_prompt_tokens:])
        self._kernels.copy_to_device(whole[:used], self.slots[slot, :used])
        self._num_words += used

    def _stage(self) -> npt.NDArray[np.int32]:
        """Room for a whole slot in this turn's buffer."""
        buffer: npt.NDArray[np.int32] = self._staged_slots[self._turn]
        if self._num_words + self._layout.num_words > len(buffer):
            self._kernels.start_to_host(self.slots[:1, :1]).wait()  # what was staged has arrived
            self._num_words = 0
        return buffer[self._num_words : self._num_words + self._layout.num_words]
