"""What a gateway measures. Call sites use attributes and methods, never metric names.

Bounds of histograms are those of the OpenTelemetry GenAI semantic conventions
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/), with finer and larger ones where a GPU is faster
than their first, or a queue longer than their last. Running and waiting requests are this gateway's own, so that the
sum over gateways is right. What the broker says (`broker_metrics.py`) is the whole deployment's, the same at every
gateway. Labels with the names of API keys come from the file of keys alone; nothing that a client sends is a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from nibble.engine.protocol import FinishReason
from nibble.service.gateway.broker_metrics import BrokerMetrics
from nibble.service.gateway.errors import ApiError, Overloaded
from nibble.service.gateway.usage import Usage
from nibble.service.metrics import Buckets, Families, registry_of

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_INTER_TOKEN_BUCKETS_S = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_DURATION_BUCKETS_S = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    *(163.84, 327.68),
)


class Outcome(StrEnum):
    """What became of a request for text. The service is to blame for REFUSED and FAILED alone."""

    OK = "ok"
    ABORTED = "aborted"  # by its client
    REJECTED = "rejected"  # it was at fault
    LIMITED = "limited"  # its key's quota was used up
    REFUSED = "refused"  # the queue was full, or nobody was there to serve it
    FAILED = "failed"

    @classmethod
    def of(cls, error: ApiError) -> Outcome:
        match error.status:
            case HTTPStatus.TOO_MANY_REQUESTS:
                return cls.REFUSED if error.code == Overloaded.code else cls.LIMITED
            case HTTPStatus.SERVICE_UNAVAILABLE:
                return cls.REFUSED
            case 499:
                return cls.ABORTED
            case status:
                return cls.FAILED if status >= 500 else cls.REJECTED


@dataclass(frozen=True)
class Ended:
    """A request that was submitted and has ended. key: the API key's name, '' where none is asked for."""

    key: str
    outcome: Outcome
    reasons: Sequence[FinishReason]  # of each choice
    usage: Usage
    duration_s: float


class GatewayMetrics(Collector):
    """All collectors of one gateway. Updated from the event loop's thread alone."""

    def __init__(self, model: str, *, vllm_names: bool) -> None:
        self.ttft_s = Buckets(_TTFT_BUCKETS_S)
        self.inter_token_s = Buckets(_INTER_TOKEN_BUCKETS_S)
        self.responses: Counter[int] = Counter()  # per HTTP status
        self.num_running = 0  # requests with a first token
        self.num_waiting = 0  # requests without
        self.broker = BrokerMetrics()
        self._duration_s = Buckets(_DURATION_BUCKETS_S)
        self._usage = Usage(0, 0, 0)
        self._finished: Counter[FinishReason] = Counter()  # per choice, aborted and failed ones too
        self._outcomes: Counter[Outcome] = Counter()
        self._key_outcomes: Counter[tuple[str, str]] = Counter()
        self._key_tokens: Counter[tuple[str, str]] = Counter()
        self._families = Families(model, vllm_names)
        self._registry = registry_of(self)

    def count_outcome(self, outcome: Outcome, key: str) -> None:
        """Of one request for text; key: as of `Ended`."""
        self._outcomes[outcome] += 1
        if key:
            self._key_outcomes[key, outcome.value] += 1

    def count_end(self, ended: Ended) -> None:
        """Its outcome, too."""
        self.count_outcome(ended.outcome, ended.key)
        self._finished.update(ended.reasons)
        self._duration_s.observe(ended.duration_s)
        self._usage += ended.usage
        if ended.key:
            self._key_tokens[ended.key, "prompt"] += ended.usage.prompt_tokens
            self._key_tokens[ended.key, "cached"] += ended.usage.cached_tokens
            self._key_tokens[ended.key, "generation"] += ended.usage.completion_tokens

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._latencies()
        yield from self._tokens()
        yield from self._requests()
        yield from self._keys()
        yield from self.broker.collect(self._families)
        yield from self._families.build_info("gateway")

    def _latencies(self) -> Iterator[Metric]:
        for name, text, buckets in (
            ("time_to_first_token_seconds", "Request received to first generated token.", self.ttft_s),
            ("inter_token_latency_seconds", "Time between generated tokens of one choice.", self.inter_token_s),
            ("e2e_request_latency_seconds", "Request received to last token.", self._duration_s),
        ):
            yield from self._families.histogram(f"nibble_{name}", text, buckets, vllm=f"vllm:{name}")

    def _tokens(self) -> Iterator[Metric]:
        new, usage = self._families, self._usage
        text = "Prompt tokens of ended requests."
        yield from new.counter("nibble_prompt_tokens_total", text, usage.prompt_tokens, vllm="vllm:prompt_tokens_total")
        text = "Prompt tokens of ended requests found in a cache."
        yield from new.counter("nibble_cached_prompt_tokens_total", text, usage.cached_tokens)
        text = "Generated tokens of ended requests."
        yield from new.counter(
            "nibble_generation_tokens_total", text, usage.completion_tokens, vllm="vllm:generation_tokens_total"
        )

    def _requests(self) -> Iterator[Metric]:
        new = self._families
        yield from new.counter_by(
            ("finished_reason",),
            "nibble_request_success_total",
            "Ended choices by finish reason, aborted and failed ones included.",
            {(reason.value,): self._finished[reason] for reason in FinishReason}.items(),
            vllm="vllm:request_success_total",
        )
        outcomes = {(outcome.value,): float(self._outcomes[outcome]) for outcome in Outcome}
        yield from new.counter_by(
            ("outcome",), "nibble_requests_total", "Requests for text by outcome.", outcomes.items()
        )
        responses = {(str(status),): float(count) for status, count in sorted(self.responses.items())}
        yield from new.counter_by(
            ("status",), "nibble_http_responses_total", "HTTP responses by status.", responses.items()
        )
        text = "Requests of this gateway with a first token."
        yield from new.gauge("nibble_num_requests_running", text, self.num_running, vllm="vllm:num_requests_running")
        text = "Requests of this gateway without a first token."
        yield from new.gauge("nibble_num_requests_waiting", text, self.num_waiting, vllm="vllm:num_requests_waiting")

    def _keys(self) -> Iterator[Metric]:
        new = self._families
        labels = ("key", "outcome")
        text = "Requests for text by API key and outcome."
        yield from new.counter_by(labels, "nibble_key_requests_total", text, self._key_outcomes.items())
        text = "Tokens of ended requests by API key; cached ones are part of the prompt's."
        yield from new.counter_by(("key", "kind"), "nibble_key_tokens_total", text, self._key_tokens.items())
