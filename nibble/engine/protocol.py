"""The values that cross between a gateway, the broker and an engine: token ids in, token ids out.

This is the only engine module that a gateway imports, so it imports nothing heavier than msgspec. All structs are
immutable and encode to msgpack arrays (`array_like`): the order of fields is the wire format, and new fields are
appended with a default. Text never appears here; stop strings and tool calls belong to the gateway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

import msgspec

# A request is served as if it had come so much later for each step of its priority number, in the queue and in the
# engine. So a lower number goes first among requests that came within that time, and nobody waits for ever.
PRIORITY_S = 60.0  # longer than most requests take: within a burst, priorities are strict
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORD_TOKENS = 17  # of one
MAX_BAD_WORDS_TOKENS = 1024  # of all, and one more for each
MAX_TEMPERATURE = 100.0  # beyond any use, as the next; both keep numbers finite
MAX_PENALTY = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_COUNT = 2**31 - 1  # int32 on the device
MAX_SEED = 2**64 - 1
MAX_BIAS = 1e30  # well within float32


class FinishReason(StrEnum):
    """Why a request ended. Every request ends with exactly one of these."""

    # An end-of-sequence or stop token id was generated (it is the last token of the log), or the grammar is complete.
    STOP = "stop"
    LENGTH = "length"  # max_tokens or the context window was reached
    ABORT = "abort"  # the client went away, or a gateway asked for it (cancel, stop string found)
    ERROR = "error"  # see TokenEvent.error


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How the tokens of one request are drawn. `check_sampling` has the limits.

    temperature: 0 means greedy. top_k: 0 means off. top_p in (0, 1], 1 means off. min_p in [0, 1], 0 means off.
    seed: an unsigned 64-bit key; token i of a request is drawn from Philox(seed, i), so a resumed request
    continues the same random sequence. stop_token_ids: generation ends after any of these (end-of-sequence
    ids included by the gateway unless the client asked to ignore them); before min_tokens were generated they are not
    drawn. Names and meaning are vLLM's, also of what follows.

    frequency_penalty, presence_penalty: of generated tokens alone. repetition_penalty: of the prompt's too, 1 means
    off. logit_bias: (token id, what is added to its logit), each id once; minus infinity forbids. allowed_token_ids:
    nothing else is drawn. bad_words_token_ids: runs of tokens that are not generated. logprobs: with each generated
    token its log probability and those of so many most probable ones come back, those of the model itself: before
    temperature, penalties, biases and bans. prompt_logprobs: the same of the prompt's tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


class InvalidSampling(ValueError):
    """A sampling parameter that no engine can honour: `field` of SamplingParams."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidSampling for what is beyond a limit, or leaves no token to draw."""
    _check_numbers(sampling)
    words, biased = sampling.bad_words_token_ids, [token_id for token_id, _ in sampling.logit_bias]
    in_words = [token_id for word in words for token_id in word]
    if len(set(biased)) < len(biased):
        raise InvalidSampling("logit_bias", "names a token id twice")
    if not all(words):
        raise InvalidSampling("bad_words_token_ids", "has an empty word")
    for field, count, limit, what in (
        ("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids"),
        ("logit_bias", len(biased), MAX_LOGIT_BIASES, "ids"),
        ("bad_words_token_ids", len(in_words) + len(words), MAX_BAD_WORDS_TOKENS, "ids and ends of words"),
        ("bad_words_token_ids", max(map(len, words), default=0), MAX_BAD_WORD_TOKENS, "ids in one word"),
    ):
        if count > limit:
            raise InvalidSampling(field, f"has {count} {what}, the limit is {limit}")
    allowed = sampling.allowed_token_ids or ()
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_ids("logit_bias", biased, vocab_size)
    _check_ids("allowed_token_ids", allowed, vocab_size)
    _check_ids("bad_words_token_ids", in_words, vocab_size)
    _check_something_is_left(sampling, vocab_size)


def _check_numbers(sampling: SamplingParams) -> None:
    if sampling.max_tokens < 1:
        raise InvalidSampling("max_tokens", f"is {sampling.max_tokens}, the least is 1")
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidSampling("min_tokens", f"is {sampling.min_tokens}, more than max_tokens {sampling.max_tokens}")
    if not 0 < sampling.top_p <= 1:
        raise InvalidSampling("top_p", f"is {sampling.top_p}, it must be above 0 and at most 1")
    for field, lowest, highest in (
        ("temperature", 0.0, MAX_TEMPERATURE),
        ("top_k", 0, MAX_COUNT),
        ("min_p", 0.0, 1.0),
        ("seed", 0, MAX_SEED),
        ("min_tokens", 0, MAX_COUNT),
        ("frequency_penalty", -MAX_PENALTY, MAX_PENALTY),
        ("presence_penalty", -MAX_PENALTY, MAX_PENALTY),
        ("repetition_penalty", MIN_REPETITION_PENALTY, MAX_PENALTY),
        ("logprobs", 0, MAX_LOGPROBS),
        ("prompt_logprobs", 0, MAX_LOGPROBS),
    ):
        value = getattr(sampling, field)
        if value is not None and not lowest <= value <= highest:
            raise InvalidSampling(field, f"is {value}, the limits are {lowest} and {highest}")
    for token_id, bias in sampling.logit_bias:
        if not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            raise InvalidSampling(
                "logit_bias", f"of token id {token_id} is {bias}, the limits are +-{MAX_BIAS} or -inf"
            )


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    bad = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if bad is not None:
        raise InvalidSampling(field, f"has token id {bad}, outside the vocabulary of {vocab_size}")


def _check_something_is_left(sampling: SamplingParams, vocab_size: int) -> None:
    forbidden = {token_id for token_id, bias in sampling.logit_bias if bias == -math.inf}
    forbidden.update(word[0] for word in sampling.bad_words_token_ids if len(word) == 1)
    if sampling.min_tokens:
        forbidden.update(sampling.stop_token_ids)
    allowed = sampling.allowed_token_ids
    if len(forbidden) >= vocab_size if allowed is None else forbidden.issuperset(allowed):
        others = "logit_bias, bad words and stop tokens before min_tokens"
        raise InvalidSampling("allowed_token_ids", f"leave no token to draw, with {others}")


class GrammarKind(StrEnum):
    """How the text of a GrammarSpec is to be read."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"  # any; the text is empty
    REGEX = "regex"  # Rust's syntax, of the whole output
    LARK = "lark"  # llguidance's dialect of Lark
    CHOICE = "choice"  # a JSON list of strings
    # A JSON object: `lark`, in which @name stands for one of `parts`: name -> [kind, text].
    COMPOSED = "composed"


class GrammarSpec(msgspec.Struct, frozen=True, array_like=True):
    """What the generated text must be. A gateway has compiled it before a request with it is submitted."""

    kind: GrammarKind
    text: str = ""


class GenerationRequest(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One prompt to be continued. Immutable from the moment it is submitted.

    arrival_s and deadline_s are Unix times in seconds; a request that has not finished by its deadline ends
    with an error. A lower priority number is served first, see PRIORITY_S. tenant groups requests for fairness.
    Requests share what was computed of a common prefix only if they have the same cache_salt. traceparent: of the span
    that it came from (W3C Trace Context); no engine looks at it.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_s: float
    deadline_s: float | None = None
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    grammar: GrammarSpec | None = None
    traceparent: str = ""


class RequestMetrics(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What the worker measured for one request. Times in seconds.

    Sent with its final event, and as far as known with its first one: a gateway that ends a request itself, at a stop
    string, never sees the other. cached_tokens: of the prompt, found computed. queue_s: submit to first scheduled.
    prefill_s: first scheduled to first token. decode_s: first token to last.
    draft_tokens: guessed and verified; accepted_tokens: of these, what was generated too.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    draft_tokens: int = 0
    accepted_tokens: int = 0


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """New tokens of one request. `index` is the position of token_ids[0] among the request's generated tokens.

    The last event of a request carries finish_reason (and may carry no tokens); error is set with ERROR alone.
    error_fields: of the request, where it is itself at fault: what together left no token to draw, be it fields of
    SamplingParams or its grammar.

    logprobs: a record for each of token_ids, where SamplingParams.logprobs is set. A record of n most probable tokens
    is 1 + 2n little-endian words of 4 bytes: the token's log probability (float32), then id (uint32) and log
    probability of each, falling; the id 0xffffffff is none. prompt_logprobs: a record for each token of the prompt but
    the first, with the event of the first generated token.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None
    logprobs: bytes | None = None
    prompt_logprobs: bytes | None = None
    error_fields: tuple[str, ...] = ()
