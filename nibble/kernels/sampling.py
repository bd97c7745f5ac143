"""The part of `interface.Kernels` that makes tokens of logits. Symbols and conventions: `interface.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any  # as in interface.py, which imports this file

MAX_LOGPROBS = 20  # most probable tokens that `Kernels.logprobs` names
LOGPROB_WORDS = 1 + 2 * MAX_LOGPROBS


@dataclass(frozen=True)
class SamplingBatch:
    """Per-row sampling parameters; see `Kernels.sample`."""

    temperature: Array  # float32 (S,), 0 = greedy
    top_k: Array  # int32 (S,), 0 = off
    top_p: Array  # float32 (S,), 1 = off
    min_p: Array  # float32 (S,), 0 = off
    seeds: Array  # uint64 (S,)
    positions: Array  # int64 (S,), index of the token to be drawn among the request's generated tokens


@dataclass(frozen=True)
class AdjustmentBatch:
    """Which slot adjusts each row, and the newest tokens; see `Kernels.adjust_logits`."""

    slots: Array  # int32 (S,), below 0: none
    ids: Array  # int32 (T,), as in the forward pass; >= 0
    rows: Array  # int32 (S,): ids[rows[s]] is the newest token of row s
    positions: Array  # int64 (S,), index of the token to be drawn among the request's generated tokens


class SamplingKernels(Protocol):
    """Ops of sampling, in the order in which a step calls them."""

    def gather_ids(self, ids: Array, latest: Array) -> Array:
        """Token ids of which some are known to the device alone: ids[t], or latest[-1 - ids[t]] where ids[t] < 0.

        ids int32 (T,), latest int32 (n,): the last sampled id of each of n sequences -> new int32 (T,). A latest id
        below 0 (a row that could not be sampled) counts as 0.
        """

    def scatter_ids(self, ids: Array, indices: Array, latest: Array) -> None:
        """latest[indices[i]] = ids[i], in place; all int32, ids and indices (S,). An index < 0 is skipped."""

    def copy_rows(self, x: Array, wanted: Array) -> Array:
        """The rows x[s] with wanted[s] >= 0, in their places; the others are undefined. x (S, V), wanted int32 (S,)
        -> new (S, V)."""

    def adjust_logits(self, logits: Array, slots: Array, adjustment: AdjustmentBatch) -> None:
        """Penalties, biases and bans of the rows' sequences, in place; logits float32 (S, V).

        `slots` int32 (num_slots, SlotLayout(V).num_words), see `kernels/slots.py`. First the sequence's newest token is
        remembered in its slot: counted, and entered into `recent`, as a generated one where positions[s] > 0, else as
        one of the prompt. So a slot holds all tokens but the newest before the call, and all of them after it.
        Then, in this order (which is vLLM's): what is not allowed, stop ids while positions[s] < min_tokens, and the
        last id of each bad word whose others are the newest generated tokens, become -inf; biases are added; where the
        token is in the prompt or was generated, x > 0 becomes x / repetition, and others x * repetition; where it was
        generated c times, x - frequency * c - presence, each operation rounded. A row whose slot is < 0 stays as it is.
        """

    def mask_logits(self, logits: Array, masks: Array, mask_rows: Array) -> None:
        """Tokens whose bit is not set become -inf, in place. logits float32 (S, V); masks int32 (n, W), W =
        mask_words(V): bit t % 32 of word t // 32 is token t's; mask_rows int32 (S,), below 0: the row stays as it is.
        """

    def logprobs(self, logits: Array, ids: Array, num_logprobs: Array, out: Array, out_rows: Array) -> None:
        """Log probabilities under softmax(logits) of ids[s] and of the num_logprobs[s] most probable tokens.

        logits float32 (S, V); ids, num_logprobs, out_rows int32 (S,). Writes `out` int32 (n, LOGPROB_WORDS), row
        out_rows[s]: the float32 bits of ids[s]'s, then for each of the others (falling, ties: smaller id first) its id
        and the float32 bits; id -1 and -inf where V is smaller. num_logprobs[s] is at most MAX_LOGPROBS; what lies
        beyond it is undefined. Where it is < 0, out_rows[s] or ids[s] is < 0, nothing is read or written. A row with
        a NaN or +inf has an undefined result.
        """

    def sample(self, logits: Array, batch: SamplingBatch) -> Array:
        """Draw one token id per row. logits float32 (S, V), may be overwritten -> new int32 (S,).

        temperature 0: the smallest id with the largest logit. Otherwise p = softmax(logits / temperature); candidates
        in order of falling p (ties: smaller id first) are cut to the top_k first, then, renormalised, to the shortest
        prefix whose sum is >= top_p, then to those with p >= min_p * max(p); at least one stays. The token is the first
        candidate whose running sum exceeds u * (sum of the candidates), with u in [0, 1) from the first 32-bit word
        (its upper 24 bits) of Philox4x32-10, key = seed (low word, high word), counter = (position low, position
        high, 0, 0). A row with a NaN or +inf, or without a finite logit, gives -1.
        """
