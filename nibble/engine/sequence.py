"""One request in the engine: its tokens, how far they are computed, its KV blocks. The only mutable value here."""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

from nibble.engine.protocol import FinishReason, GenerationRequest, RequestMetrics


@dataclass(eq=False, slots=True)
class Sequence:
    """token_ids is prompt + generated; the first num_computed_tokens of them have keys and values in block_table."""

    request: GenerationRequest
    token_ids: list[int]
    num_prompt_tokens: int
    added_s: float
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @classmethod
    def start(cls, request: GenerationRequest, generated_token_ids: TokenSequence[int], now_s: float) -> Sequence:
        """A new sequence, or one that another worker began: generated_token_ids continue its prompt."""
        return cls(
            request=request,
            token_ids=[*request.prompt_token_ids, *generated_token_ids],
            num_prompt_tokens=len(request.prompt_token_ids),
            added_s=now_s,
        )

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.num_computed_tokens < self.num_prompt_tokens

    def append(self, token_id: int, max_context_tokens: int, now_s: float) -> None:
        """Add a generated token and decide whether it was the last."""
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.token_ids.append(token_id)
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids and self.num_generated_tokens > sampling.min_tokens:
            self.finish_reason = FinishReason.STOP
        elif self.num_generated_tokens >= sampling.max_tokens or self.num_tokens >= max_context_tokens:
            self.finish_reason = FinishReason.LENGTH

    def metrics(self, now_s: float) -> RequestMetrics:
        """Times as seen by this worker; Unix times on the same clock as request.arrival_s."""
        scheduled_s = self.scheduled_s if self.scheduled_s is not None else now_s
        first_token_s = self.first_token_s if self.first_token_s is not None else now_s
        return RequestMetrics(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=0,
            generated_tokens=self.num_generated_tokens,
            queue_s=max(0.0, scheduled_s - self.request.arrival_s),
            prefill_s=max(0.0, first_token_s - scheduled_s),
            decode_s=max(0.0, now_s - first_token_s),
        )
