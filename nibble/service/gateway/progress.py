"""What metrics, the log and a span are told of one request, of which this gateway is the owner."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nibble.engine.protocol import FinishReason
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.metrics import Ended, GatewayMetrics, Outcome
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.usage import Usage

if TYPE_CHECKING:
    from nibble.service.gateway.tracing import RequestSpan

logger = logging.getLogger(__name__)


class Progress:
    """`begin`, `observe` for all new tokens, `end`. ttft_s: None until there is a token. span: where tracing is on."""

    __slots__ = ("_metrics", "_plan", "_span", "ttft_s")

    def __init__(self, plan: Plan, metrics: GatewayMetrics, span: RequestSpan | None) -> None:
        self.ttft_s: float | None = None
        self._plan = plan
        self._metrics = metrics
        self._span = span

    def begin(self) -> None:
        self._metrics.num_waiting += 1

    def observe(self, choice: Choice, num_new: int, *, is_first: bool) -> None:
        """Every token but a choice's first has a gap before it; tokens that came together share the time they took."""
        now_s = time.monotonic()
        inter_token_s = self._metrics.inter_token_s
        if not is_first:
            inter_token_s.observe((now_s - choice.last_token_s) / num_new, num_new)
        else:
            if num_new > 1:
                inter_token_s.observe(0.0, num_new - 1)
            if self.ttft_s is None:
                self._on_first_token()
        choice.last_token_s = now_s

    def end(self, choices: Sequence[Choice], usage: Usage, error: ApiError | None) -> None:
        """error: what the client was told, if it was one."""
        metrics, duration_s = self._metrics, self._age_s()
        if self.ttft_s is None:
            metrics.num_waiting -= 1
        else:
            metrics.num_running -= 1
        unfinished = FinishReason.ABORT if error is None or error.status < 500 else FinishReason.ERROR
        reasons = [choice.finish_reason or unfinished for choice in choices]
        is_whole = all(choice.finish_reason is not None for choice in choices)
        outcome = Outcome.of(error) if error else Outcome.OK if is_whole else Outcome.ABORTED
        metrics.count_end(Ended(self._plan.tenant, outcome, reasons, usage, duration_s))
        if self._span is not None:
            self._span.on_end(reasons, usage)
            if error is not None:
                self._span.on_error(error)
        logger.info(
            "request_id=%s status=%d finish_reason=%s prompt_tokens=%d generated_tokens=%d ttft_ms=%s duration_ms=%.0f",
            self._plan.request_id,
            error.status if error else 200,
            ",".join(reasons),
            usage.prompt_tokens,
            usage.completion_tokens,
            "-" if self.ttft_s is None else f"{self.ttft_s * 1e3:.0f}",
            duration_s * 1e3,
        )

    def _on_first_token(self) -> None:
        self.ttft_s = self._age_s()
        self._metrics.ttft_s.observe(self.ttft_s)
        self._metrics.num_waiting -= 1
        self._metrics.num_running += 1
        if self._span is not None:
            self._span.on_first_token(self.ttft_s)

    def _age_s(self) -> float:
        return time.time() - self._plan.arrival_s
