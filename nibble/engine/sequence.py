"""One request in the engine: its tokens, how far they are computed, its KV blocks. The only mutable value here.

A token goes through two moments: a step that samples it is launched, and later the host reads its id. In between it is
`unread`: it counts as a token of the sequence, and the next step may compute it (the device knows its id), but it is
not in `token_ids`. On a backend that finishes a step before it returns, nothing is ever unread between two steps.

A step may compute drafts behind the newest token (`speculative.py`). They are no tokens of the sequence: those that
turn out to be its next ones are read together with the unread token, and have keys and values from then on. Until then
the sequence is held, as the next step cannot know how many they are.

Invariants between steps, for the scheduler and the runner:
    num_computed_tokens < num_tokens       the newest token's logits are wanted, nobody has asked for them
    num_tokens <= max_num_tokens           no step beyond the last token is ever launched
    num_unread_tokens <= 1                 and only the newest token can be unread
"""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nibble.engine.block_hashes import extend_hashes
from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics
from nibble.engine.sampling_params import record_bytes, slot_content
from nibble.engine.service_order import Rank
from nibble.kernels.layout import BLOCK_SIZE
from nibble.kernels.slots import SlotContent

INITIAL_ACCEPTANCE = 0.7  # hopeful: what it is shows after a few drafts


@dataclass(eq=False, slots=True)
class Sequence:
    """token_ids is prompt + generated, as far as read. The first num_computed_tokens tokens have keys and values in
    block_table once the steps launched so far have finished."""

    request: GenerationRequest
    token_ids: list[int]
    num_prompt_tokens: int
    num_prefill_tokens: int  # the first of the prompt's, computed in PREFILL mode; all others are in DECODE mode
    max_num_tokens: int  # prompt included; generation ends there
    added_s: float
    rank: Rank = ()  # its place in the order of service
    num_computed_tokens: int = 0
    num_unread_tokens: int = 0
    sample_row: int = 0  # where the step that samples the newest unread token leaves it, see ModelRunner
    block_table: list[int] = field(default_factory=list)
    num_shared_blocks: int = 0  # the first of block_table, which others may find
    num_cached_tokens: int | None = None  # of the prompt, found computed when it first started; None before
    _block_hashes: list[bytes] = field(default_factory=list)
    slot_content: SlotContent | None = None  # how its logits are adjusted; None: not at all
    is_plain: bool = True  # nothing below concerns it: no slot, no mask, no log probabilities, now or later
    token_masks: npt.NDArray[np.int32] | None = None  # see `set_masks`
    is_held: bool = False  # no step may compute it: what comes or may be drawn next is not known yet, see `Constraints`
    can_draft: bool = True  # no adjustment of its logits depends on tokens, see `Adjustments`
    drafts: list[int] = field(default_factory=list)  # what may come after token_ids; the next step verifies them
    acceptance: float = INITIAL_ACCEPTANCE  # how probably its next draft is right
    num_draft_tokens: int = 0  # verified so far ...
    num_accepted_tokens: int = 0  # ... and how many of them were right
    newest_logprobs: bytes | None = None  # records of the newest tokens that were read
    prompt_logprobs: bytearray | None = None  # records of the prompt, until they are sent
    finish_reason: FinishReason | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @classmethod
    def start(
        cls,
        request: GenerationRequest,
        generated_token_ids: TokenSequence[int],
        max_context_tokens: int,
        now_s: float,
        num_prefill_tokens: int | None = None,
    ) -> Sequence:
        """A new sequence, or one that another worker began: generated_token_ids continue its prompt.

        num_prefill_tokens: see `Kernels`; None: all of the prompt, as always where its log probabilities are asked for.
        """
        token_ids = [*request.prompt_token_ids, *generated_token_ids]
        num_prompt_tokens = len(request.prompt_token_ids)
        sampling, content = request.sampling, slot_content(request.sampling)
        if num_prefill_tokens is None or sampling.prompt_logprobs is not None:
            num_prefill_tokens = num_prompt_tokens
        limit = min(num_prompt_tokens + request.sampling.max_tokens, max_context_tokens)
        return cls(
            request=request,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            num_prefill_tokens=num_prefill_tokens,
            max_num_tokens=max(limit, len(token_ids) + 1),  # every sequence that starts gets a token
            added_s=now_s,
            slot_content=content,
            can_draft=content is None or not content.depends_on_tokens,
            is_plain=content is None and sampling.logprobs is None and sampling.prompt_logprobs is None,
            prompt_logprobs=_prompt_records(request, num_generated=len(generated_token_ids)),
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Unread ones included."""
        return len(self.token_ids) + self.num_unread_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Unread ones included: the index of the next token among the generated ones."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_read_tokens(self) -> int:
        """Generated tokens whose ids the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def needs_slot(self) -> bool:
        """Whether anything but `sample` itself depends on its slot in the next step."""
        content = self.slot_content
        if content is None:
            return False
        return not content.ends_with_min_tokens or self.num_generated_tokens < content.min_tokens

    @property
    def samples_plainly(self) -> bool:
        """Whether its next token needs no slot, no mask and no log probabilities."""
        return self.is_plain or not (self.needs_slot or self.token_masks is not None or self._wants_logprobs)

    def set_masks(self, masks: npt.NDArray[np.int32] | None) -> None:
        """What may be drawn next, and behind each of the drafts: int32 (1 + drafts, W), see
        `SamplingKernels.mask_logits`. It stays until it is set anew."""
        self.token_masks, self.is_plain = masks, False

    @property
    def max_drafts(self) -> int:
        """Drafts of its next step that could come to be tokens, once all tokens are read."""
        return self.max_num_tokens - len(self.token_ids) - 1 if self.can_draft else 0

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens are to be computed in PREFILL mode next."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether nothing is to be computed but its newest token, a generated one."""
        num_computed = self.num_computed_tokens
        num_tokens = len(self.token_ids) + self.num_unread_tokens  # as num_tokens; asked of all in every step
        return num_computed + 1 == num_tokens and num_computed >= self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the last token it may have was sampled, be it read or not: there is nothing more to compute."""
        return len(self.token_ids) + self.num_unread_tokens >= self.max_num_tokens

    def block_hashes(self, num_blocks: int) -> list[bytes]:
        """Names of what its first num_blocks blocks hold, or will; their tokens are all read."""
        hashes = self._block_hashes
        if len(hashes) < num_blocks:
            assert num_blocks * BLOCK_SIZE <= len(self.token_ids), "a block without all its tokens has no name"
            extend_hashes(hashes, num_blocks, self.token_ids, self.num_prefill_tokens, self.request.cache_salt)
        return hashes[:num_blocks]

    @property
    def _wants_logprobs(self) -> bool:
        return self.request.sampling.logprobs is not None

    def launched(self, num_tokens: int, sample_row: int | None, num_drafts: int = 0) -> None:
        """A step that computes its next num_tokens tokens, and so many drafts behind them, was launched; sample_row
        None: it samples no new one."""
        self.num_computed_tokens += num_tokens
        if sample_row is not None:
            self.num_unread_tokens += 1
            self.sample_row = sample_row
            del self.drafts[num_drafts:]
            self.is_held = num_drafts > 0 or self.request.grammar is not None

    def append(self, token_ids: list[int], now_s: float) -> list[int]:
        """Read the oldest unread token and the accepted drafts: all of them but the last were drafts, and are computed.

        Decides whether the last one was the sequence's last. Returns those up to the first stop token.
        """
        assert self.num_unread_tokens > 0, f"request {self.request_id} has no unread token"
        if self.first_token_s is None:
            self.first_token_s = now_s
        drawn, token_ids = token_ids, self._until_stop(token_ids)
        if self.newest_logprobs is not None:
            self.newest_logprobs = self.newest_logprobs[: len(self.newest_logprobs) // len(drawn) * len(token_ids)]
        self.num_unread_tokens -= 1
        self.token_ids += token_ids
        if self.block_table:  # else it was preempted meanwhile
            self.num_computed_tokens += len(token_ids) - 1
        if self.drafts:
            self.drafts, self.is_held = [], self.request.grammar is not None
        if self.finish_reason is None and len(self.token_ids) >= self.max_num_tokens:
            self.finish_reason = FinishReason.LENGTH
        return token_ids

    def _until_stop(self, token_ids: list[int]) -> list[int]:
        sampling = self.request.sampling
        for count, token_id in enumerate(token_ids, 1):
            if token_id in sampling.stop_token_ids and self.num_read_tokens + count > sampling.min_tokens:
                self.finish_reason = FinishReason.STOP
                return token_ids[:count]
        return token_ids

    def take_logprobs(self) -> tuple[bytes | None, bytes | None]:
        """Records of the newest tokens and, once, of the prompt."""
        newest, prompt = self.newest_logprobs, self.prompt_logprobs
        self.newest_logprobs = self.prompt_logprobs = None
        return newest, None if prompt is None else bytes(prompt)

    def metrics(self, now_s: float) -> RequestMetrics:
        """Times as seen by this worker; Unix times on the same clock as request.arrival_s."""
        scheduled_s = self.scheduled_s if self.scheduled_s is not None else now_s
        first_token_s = self.first_token_s if self.first_token_s is not None else now_s
        return RequestMetrics(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.num_cached_tokens or 0,
            generated_tokens=self.num_read_tokens,
            queue_s=max(0.0, scheduled_s - self.request.arrival_s),
            prefill_s=max(0.0, first_token_s - scheduled_s),
            decode_s=max(0.0, now_s - first_token_s),
            draft_tokens=self.num_draft_tokens,
            accepted_tokens=self.num_accepted_tokens,
        )


def _prompt_records(request: GenerationRequest, num_generated: int) -> bytearray | None:
    """Room for them; None if they were not asked for, or already sent with the first token."""
    count = request.sampling.prompt_logprobs
    if count is None or num_generated:
        return None
    return bytearray((len(request.prompt_token_ids) - 1) * record_bytes(count))
