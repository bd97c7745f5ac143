"""The tokens of one choice to the text that a client sees.

A pure function of the token log: how the tokens were grouped into events changes neither the text nor the counts.
"""

from __future__ import annotations

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.service.gateway.chat import ChatPlan
from nibble.service.gateway.detokenizer import Detokenizer
from nibble.service.gateway.stops import StopScanner


class Choice:
    """State of one choice.

    num_tokens: generated tokens so far, the end-of-sequence token included, but none after a stop string.
    finish_reason: set with the last text. is_stream_done: whether the engine is done too; it is not when a stop string
    ended the choice, and then has to be told.
    """

    __slots__ = (
        "_detokenizer",
        "_min_tokens",
        "_pending",
        "_scanner",
        "_shows_stop",
        "_stop_token_ids",
        "finish_reason",
        "is_stream_done",
        "metrics",
        "num_tokens",
    )

    def __init__(self, plan: ChatPlan, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(plan.stops, include_stop=plan.include_stop) if plan.stops else None
        self._min_tokens = plan.requests[0].sampling.min_tokens
        self._stop_token_ids = frozenset(plan.requests[0].sampling.stop_token_ids)
        self._pending: list[int] = []  # the newest token if it may be a stop token whose finish reason is still to come
        self._shows_stop = plan.include_stop
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.is_stream_done = False
        self.metrics: RequestMetrics | None = None

    def push(self, event: TokenEvent) -> str:
        """Return the text that became certain. Nothing is pushed once finish_reason is set."""
        token_ids = self._pending + event.token_ids if self._pending else event.token_ids
        reason = event.finish_reason
        self.metrics = event.metrics or self.metrics
        if reason is not None:
            self.is_stream_done = True
            self._pending = []
        elif token_ids:
            self._pending = token_ids[-1:] if token_ids[-1] in self._stop_token_ids else []
            token_ids = token_ids[:-1] if self._pending else token_ids
        num_hidden = 1 if reason is FinishReason.STOP and self._hides_last(token_ids) else 0
        visible = token_ids[:-1] if num_hidden else token_ids
        if self._scanner is None:
            self.num_tokens += len(visible)
            text = self._detokenizer.push(visible)
        else:
            text = self._scan(visible, self._scanner)
            if self.finish_reason is not None:
                return text
        self.num_tokens += num_hidden
        if reason is None:
            return text
        self.finish_reason = reason
        return text + self._flush()

    def _hides_last(self, token_ids: list[int]) -> bool:
        """The token that ended a generation is a marker, not part of the answer."""
        return bool(token_ids) and token_ids[-1] in self._stop_token_ids and not self._shows_stop

    def _scan(self, token_ids: list[int], scanner: StopScanner) -> str:
        """One token at a time, so that the count ends with the token that completed a stop string."""
        texts = []
        for token_id in token_ids:
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens >= self._min_tokens:  # before that, the text may hold stop strings
                text, is_stopped = scanner.push(text)
                if is_stopped:
                    self.finish_reason = FinishReason.STOP
            texts.append(text)
            if self.finish_reason is not None:
                break
        return "".join(texts)

    def _flush(self) -> str:
        text = self._detokenizer.flush()
        if self._scanner is None:
            return text
        text, is_stopped = self._scanner.push(text)
        if not is_stopped:
            return text + self._scanner.flush()
        if self.finish_reason is FinishReason.LENGTH:
            self.finish_reason = FinishReason.STOP
        return text
