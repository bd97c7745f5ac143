"""The worker's collectors. Call sites use attributes and methods, never metric names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nibble.engine.protocol import RequestMetrics
from nibble.engine.stats import EngineStats

_STEP_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class WorkerMetrics:
    """All metrics of one worker; with_vllm_names adds the names that existing dashboards and autoscalers read."""

    def __init__(self, model_name: str, read_bandwidth: float, with_vllm_names: bool) -> None:
        self.registry = CollectorRegistry()
        self._read_bandwidth = read_bandwidth
        self._last = EngineStats()
        self._model_name = model_name
        self.steps = self._counter("nibble_engine_steps_total", "Steps computed")
        self.prompt_tokens = self._counter("nibble_prefill_tokens_total", "Prompt tokens computed")
        self.generated_tokens = self._counter("nibble_decode_tokens_total", "Tokens generated")
        self._cache_queries = [self._counter("nibble_prefix_cache_queries_total", "Prompt tokens looked up")]
        self._cache_hits = [self._counter("nibble_prefix_cache_hits_total", "Prompt tokens found in the prefix cache")]
        self._draft_tokens = [self._counter("nibble_draft_tokens_total", "Tokens guessed and verified")]
        self._accepted_tokens = [
            self._counter("nibble_accepted_draft_tokens_total", "Of these, tokens that were right")
        ]
        self.preemptions = self._counter("nibble_preemptions_total", "Sequences preempted for want of KV blocks")
        self.nonfinite = self._counter("nibble_nonfinite_logits_total", "Requests ended by NaN or Inf logits")
        self.recovered = self._counter("nibble_recovered_requests_total", "Requests taken over from another worker")
        self.fenced = self._counter("nibble_fenced_appends_total", "Appends refused because the request moved on")
        self.quarantined = self._counter(
            "nibble_quarantined_requests_total", "Requests given up after too many lost workers"
        )
        self.expired = self._counter("nibble_expired_requests_total", "Requests ended by their deadline")
        self.bandwidth_utilization = self._gauge(
            "nibble_bandwidth_utilization_ratio",
            "Bytes the last step had to read / its time / the device's measured read bandwidth",
        )
        self.step_seconds = self._histogram("nibble_engine_step_seconds", "Time of one step", _STEP_BUCKETS)
        self._running = [self._gauge("nibble_running_sequences", "Sequences that have KV blocks")]
        self._waiting = [self._gauge("nibble_waiting_sequences", "Sequences waiting inside the engine")]
        self._kv_usage = [self._gauge("nibble_kv_cache_usage_ratio", "Share of the KV blocks in use")]
        self._queue = [self._histogram("nibble_request_queue_seconds", "Submit to first scheduled", _QUEUE_BUCKETS)]
        if with_vllm_names:
            self._cache_queries.append(
                self._counter("vllm:prefix_cache_queries", "As nibble_prefix_cache_queries_total")
            )
            self._cache_hits.append(self._counter("vllm:prefix_cache_hits", "As nibble_prefix_cache_hits_total"))
            self._draft_tokens.append(
                self._counter("vllm:spec_decode_num_draft_tokens", "As nibble_draft_tokens_total")
            )
            self._accepted_tokens.append(
                self._counter("vllm:spec_decode_num_accepted_tokens", "As nibble_accepted_draft_tokens_total")
            )
            self._running.append(self._gauge("vllm:num_requests_running", "As nibble_running_sequences"))
            self._waiting.append(self._gauge("vllm:num_requests_waiting", "As nibble_waiting_sequences"))
            self._kv_usage.append(self._gauge("vllm:kv_cache_usage_perc", "As nibble_kv_cache_usage_ratio"))
            self._queue.append(
                self._histogram("vllm:request_queue_time_seconds", "As nibble_request_queue_seconds", _QUEUE_BUCKETS)
            )

    def observe_step(self, stats: EngineStats) -> None:
        """Take over the engine's numbers after a step, or while idle."""
        last = self._last
        self.steps.inc(stats.num_steps - last.num_steps)
        self.prompt_tokens.inc(stats.num_prompt_tokens - last.num_prompt_tokens)
        self.generated_tokens.inc(stats.num_generated_tokens - last.num_generated_tokens)
        self.preemptions.inc(stats.num_preemptions - last.num_preemptions)
        self.nonfinite.inc(stats.num_nonfinite_logits - last.num_nonfinite_logits)
        for counters, increase in (
            (self._cache_queries, stats.num_cache_queries - last.num_cache_queries),
            (self._cache_hits, stats.num_cache_hits - last.num_cache_hits),
            (self._draft_tokens, stats.num_draft_tokens - last.num_draft_tokens),
            (self._accepted_tokens, stats.num_accepted_tokens - last.num_accepted_tokens),
        ):
            for counter in counters:
                counter.inc(increase)
        if stats.num_steps > last.num_steps and stats.step_s > 0:
            self.step_seconds.observe(stats.step_s)
            self.bandwidth_utilization.set(stats.step_bytes / stats.step_s / self._read_bandwidth)
        for gauges, value in (
            (self._running, stats.num_running),
            (self._waiting, stats.num_waiting),
            (self._kv_usage, stats.kv_cache_usage),
        ):
            for gauge in gauges:
                gauge.set(value)
        self._last = EngineStats(**vars(stats))

    def observe_request(self, metrics: RequestMetrics) -> None:
        for histogram in self._queue:
            histogram.observe(metrics.queue_s)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(name, help_text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, help_text, ("model_name",), registry=self.registry, buckets=buckets)
        return histogram.labels(self._model_name)
