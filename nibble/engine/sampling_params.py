"""SamplingParams as the content of a slot of the device (`kernels/slots.py`), which has room for what is allowed."""

from __future__ import annotations

from nibble.engine import protocol
from nibble.engine.protocol import SamplingParams
from nibble.kernels import sampling, slots
from nibble.kernels.slots import SlotContent

WORD_BYTES = 4

# A gateway checks the limits without importing kernels.
assert protocol.MAX_LOGPROBS == sampling.MAX_LOGPROBS, "limits must agree"
assert protocol.MAX_STOP_TOKEN_IDS == slots.MAX_STOP_IDS, "limits must agree"
assert protocol.MAX_LOGIT_BIASES == slots.MAX_BIASES, "limits must agree"
assert protocol.MAX_BAD_WORD_TOKENS == slots.NUM_RECENT + 1, "limits must agree"
assert protocol.MAX_BAD_WORDS_TOKENS == slots.MAX_BAD_WORD_WORDS, "limits must agree"


def slot_content(params: SamplingParams) -> SlotContent | None:
    """What has to be in a slot for this request's logits; None if they stay as they are."""
    content = SlotContent(
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        min_tokens=params.min_tokens if params.stop_token_ids else 0,
        stop_ids=params.stop_token_ids if params.min_tokens else (),
        biases=params.logit_bias,
        bad_words=params.bad_words_token_ids,
        allowed=params.allowed_token_ids,
    )
    return None if content == SlotContent() else content


def record_bytes(num_logprobs: int) -> int:
    """Bytes of one token's record of log probabilities, see `TokenEvent`."""
    return (1 + 2 * num_logprobs) * WORD_BYTES
