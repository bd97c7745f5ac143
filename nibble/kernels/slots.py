"""Sampling slots: what a backend keeps of a sequence between steps to adjust its logits. The format, in prose once.

`SlotLayout.write` writes it in the host's memory; `cpu/adjust_logits.py` and `cuda/adjust_logits.cu` read and keep it
up to date on the device. numpy only.

The slots of an engine are one int32 array (num_slots, num_words). A slot, with words counted from its start:

    0       the header, a word each: see `Header`
    16      recent: generated token i is word 16 + i % 16
    32      stop ids, 256
    288     bias ids, 1024
    1312    bias values, float32, 1024
    2336    bad words, 1024: the ids of each, and -1 after each
    3360    allowed tokens: bit t % 32 of word t // 32 is set where token t may be drawn
    then    counts, uint16, one for each token: how often it was generated (32767 at most); 32768 is added where the
            prompt has it

Each part begins at a multiple of 16 bytes. What the header does not announce is undefined, and the parts that few need
come last, so that a copy to the device may end before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

NUM_RECENT = 16  # so a bad word has one id more at most
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_BAD_WORD_WORDS = 1024  # ids and ends
RECENT, STOP_IDS = 16, 32
BIAS_IDS = STOP_IDS + MAX_STOP_IDS
BIAS_VALUES = BIAS_IDS + MAX_BIASES
BAD_WORDS = BIAS_VALUES + MAX_BIASES
ALLOWED = BAD_WORDS + MAX_BAD_WORD_WORDS
IN_PROMPT = 1 << 15  # of a count
MAX_COUNT = IN_PROMPT - 1
END_OF_WORD = -1
BITS = 32  # of a word of a mask
_ALIGNMENT = 4  # words


class Header(IntEnum):
    """Words of the header. The first three are float32."""

    REPETITION = 0  # penalty; 1: none
    FREQUENCY = 1  # 0: none
    PRESENCE = 2  # 0: none
    MIN_TOKENS = 3  # stop ids are forbidden before so many tokens were generated
    NUM_STOP_IDS = 4
    NUM_BIASES = 5
    NUM_BAD_WORD_WORDS = 6  # ids and ends
    HAS_ALLOWED = 7
    HAS_COUNTS = 8


def mask_words(vocab_size: int) -> int:
    """int32 words of a mask with one bit per token."""
    return -(-vocab_size // BITS)


@dataclass(frozen=True)
class SlotContent:
    """What a slot says of its sequence for good. The caller has checked lengths and that ids are in the vocabulary."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    min_tokens: int = 0
    stop_ids: Sequence[int] = ()
    biases: Sequence[tuple[int, float]] = ()  # each id once; -inf forbids
    bad_words: Sequence[Sequence[int]] = ()
    allowed: Sequence[int] | None = None

    @property
    def has_counts(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether which tokens were generated, and not their number alone, decides on the next one's logits."""
        return self.has_counts or any(len(word) > 1 for word in self.bad_words)

    @property
    def ends_with_min_tokens(self) -> bool:
        """Whether nothing is adjusted any more once min_tokens were generated."""
        return not (self.has_counts or self.biases or self.bad_words or self.allowed is not None)


@dataclass(frozen=True)
class SlotLayout:
    """Where the parts of a slot are."""

    vocab_size: int

    @property
    def counts(self) -> int:
        return ALLOWED + _aligned(mask_words(self.vocab_size))

    @property
    def num_words(self) -> int:
        return self.counts + _aligned(-(-self.vocab_size // 2))

    def view(self, slot: npt.NDArray[np.int32]) -> SlotView:
        """The parts of one slot in the host's memory."""
        return SlotView(
            header=slot[:RECENT],
            header_floats=slot[:RECENT].view(np.float32),
            recent=slot[RECENT:STOP_IDS],
            stop_ids=slot[STOP_IDS:BIAS_IDS],
            bias_ids=slot[BIAS_IDS:BIAS_VALUES],
            bias_values=slot[BIAS_VALUES:BAD_WORDS].view(np.float32),
            bad_words=slot[BAD_WORDS:ALLOWED],
            allowed=slot[ALLOWED : ALLOWED + mask_words(self.vocab_size)],
            counts=slot[self.counts : self.num_words].view(np.uint16)[: self.vocab_size],
        )

    def used_words(self, content: SlotContent) -> int:
        """How many words from its start a slot with this content uses."""
        if content.has_counts:
            return self.num_words
        return ALLOWED if content.allowed is None else self.counts

    def write(
        self, slot: npt.NDArray[np.int32], content: SlotContent, prompt: Sequence[int], generated: Sequence[int]
    ) -> None:
        """Fill a slot in the host's memory: the content, and the tokens up to now."""
        view = self.view(slot)
        view.header_floats[:3] = content.repetition, content.frequency, content.presence
        words = [word for ids in content.bad_words for word in (*ids, END_OF_WORD)]
        num_stop_ids, num_biases = len(content.stop_ids), len(content.biases)
        view.header[Header.MIN_TOKENS :][:6] = (
            content.min_tokens,
            num_stop_ids,
            num_biases,
            len(words),
            content.allowed is not None,
            content.has_counts,
        )
        view.stop_ids[:num_stop_ids], view.bad_words[: len(words)] = content.stop_ids, words
        if content.biases:
            view.bias_ids[:num_biases], view.bias_values[:num_biases] = zip(*content.biases, strict=True)
        if content.allowed is not None:
            view.allowed[:] = pack_mask(content.allowed, self.vocab_size)
        for i in range(max(0, len(generated) - NUM_RECENT), len(generated)):
            view.recent[i % NUM_RECENT] = generated[i]
        if content.has_counts:
            ids, counts = np.unique(np.asarray(generated, np.int64), return_counts=True)
            view.counts[:] = 0
            view.counts[ids] = np.minimum(counts, MAX_COUNT)
            view.counts[np.asarray(prompt, np.int64)] |= IN_PROMPT


@dataclass(frozen=True)
class SlotView:
    """Views of one slot."""

    header: npt.NDArray[np.int32]
    header_floats: npt.NDArray[np.float32]
    recent: npt.NDArray[np.int32]
    stop_ids: npt.NDArray[np.int32]
    bias_ids: npt.NDArray[np.int32]
    bias_values: npt.NDArray[np.float32]
    bad_words: npt.NDArray[np.int32]
    allowed: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint16]


def pack_mask(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """A mask with the bits of these tokens, int32 (mask_words,)."""
    bits = np.zeros(mask_words(vocab_size) * BITS, np.uint8)
    bits[np.asarray(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def unpack_mask(mask: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Whether each token's bit is set, bool (vocab_size,)."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
