"""What the gateway measures, for Prometheus: `nibble_*`, and the `vllm:*` names that dashboards and autoscalers read.

A value is stored once and exported under both names. Histogram buckets are those of the OpenTelemetry GenAI semantic
conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/). Running and waiting requests are this
gateway's own, so that the sum over gateways is right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nibble.engine.protocol import FinishReason

_TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_INTER_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_DURATION_BUCKETS_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Buckets:
    """A histogram. prometheus_client's costs several microseconds an observation; this one is on the token path."""

    def __init__(self, upper_bounds: Sequence[float]) -> None:
        self._upper_bounds = upper_bounds
        self._counts = [0] * (len(upper_bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._upper_bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total = 0
        cumulative = []
        for bound, count in zip([*map(str, self._upper_bounds), "+Inf"], self._counts, strict=True):
            total += count
            cumulative.append((bound, total))
        family.add_metric(labels, buckets=cumulative, sum_value=self._sum)


class GatewayMetrics(Collector):
    """All collectors of one gateway. Updated from the event loop's thread alone."""

    def __init__(self, model: str, *, vllm_names: bool) -> None:
        self.ttft_s = Buckets(_TTFT_BUCKETS_S)
        self.inter_token_s = Buckets(_INTER_TOKEN_BUCKETS_S)
        self.duration_s = Buckets(_DURATION_BUCKETS_S)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[FinishReason] = Counter()  # per choice, aborted and failed ones too
        self.responses: Counter[int] = Counter()  # per HTTP status
        self.num_running = 0  # requests with a first token
        self.num_waiting = 0  # requests without
        self._labels = [model]
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._histograms()
        yield from self._counters()
        yield from self._gauges()

    def _histograms(self) -> Iterator[Metric]:
        for name, text, buckets in (
            ("time_to_first_token_seconds", "Request received to first generated token.", self.ttft_s),
            ("inter_token_latency_seconds", "Time between generated tokens of one choice.", self.inter_token_s),
            ("e2e_request_latency_seconds", "Request received to last token.", self.duration_s),
        ):
            for full_name in self._names(name):
                family = HistogramMetricFamily(full_name, text, labels=["model_name"])
                buckets.add_to(family, self._labels)
                yield family

    def _counters(self) -> Iterator[Metric]:
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts of ended requests.", self.prompt_tokens),
            ("generation_tokens", "Generated tokens of ended requests.", self.generation_tokens),
        ):
            for full_name in self._names(name):
                family = CounterMetricFamily(full_name, text, labels=["model_name"])
                family.add_metric(self._labels, value)
                yield family
        cached = CounterMetricFamily(
            "nibble_cached_prompt_tokens", "Prompt tokens of ended requests found in a cache.", labels=["model_name"]
        )
        cached.add_metric(self._labels, self.cached_tokens)
        yield cached
        for full_name in self._names("request_success"):
            text = "Ended choices by finish reason, aborted and failed ones included."
            family = CounterMetricFamily(full_name, text, labels=["model_name", "finished_reason"])
            for reason in FinishReason:
                family.add_metric([*self._labels, reason.value], self.finished[reason])
            yield family
        responses = CounterMetricFamily("nibble_http_responses", "HTTP responses by status.", labels=["status"])
        for status, count in sorted(self.responses.items()):
            responses.add_metric([str(status)], count)
        yield responses

    def _gauges(self) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Requests of this gateway with a first token.", self.num_running),
            ("num_requests_waiting", "Requests of this gateway without a first token.", self.num_waiting),
        ):
            for full_name in self._names(name):
                family = GaugeMetricFamily(full_name, text, labels=["model_name"])
                family.add_metric(self._labels, value)
                yield family

    def _names(self, name: str) -> Iterable[str]:
        return (f"nibble_{name}", f"vllm:{name}") if self._vllm_names else (f"nibble_{name}",)
