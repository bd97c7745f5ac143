"""What a worker measures. Call sites use attributes and methods, never metric names.

Written by the loop's thread, read by that of the HTTP server: every value is a number that is replaced whole.

**Utilisation of bandwidth.** Decode is bound by memory, so what a decode step costs at least is the time to read what
it must: all weights once, and the keys and values of every sequence. `nibble_bandwidth_utilization_ratio` is that
number of bytes, divided by the time of the steps and by the bandwidth that a kernel which only reads was measured to
reach on this device at start. It is of steps without prompt tokens alone (those with are bound by arithmetic), and of
about the last second of them. Activations, logits, sampling and a draft model's weights are not in the bytes, all time
that they take is in the time: the ratio never flatters.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from nibble.engine.protocol import RequestMetrics
from nibble.engine.stats import EngineStats
from nibble.service.broker.wire import Exchange, WorkerInfo
from nibble.service.metrics import Buckets, Families, RecentRatio, registry_of

# A step takes 2 ms where a GPU decodes for one sequence, seconds where two cores read a long prompt.
_STEP_BUCKETS_S = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
_EXCHANGE_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_REQUEST_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_RECENT_S = 1.0
_DECODE, _PREFILL = "decode", "prefill"


class WorkerMetrics(Collector):
    """All metrics of one worker."""

    def __init__(self, model_name: str, read_bandwidth: float, with_vllm_names: bool) -> None:
        """read_bandwidth: bytes per second, of the device."""
        self.info: WorkerInfo | None = None  # what and where it is, once that is known
        self.weight_bytes = 0
        self.kv_cache_bytes = 0
        self.exchange_s = Buckets(_EXCHANGE_BUCKETS_S)  # round trips to the broker
        self.turn_s = 0.0  # of all turns of the loop in which there was a step: the exchange before it, and the step
        self.host_s = 0.0  # ... less what the host waited for the device
        self.recovered = self.fenced = self.quarantined = self.expired = 0
        self._stats = EngineStats()
        self._num_steps = 0
        self._read_bandwidth = read_bandwidth
        self._step_s = {kind: Buckets(_STEP_BUCKETS_S) for kind in (_DECODE, _PREFILL)}
        self._read_bytes = dict.fromkeys((_DECODE, _PREFILL), 0)
        self._recent_bytes = RecentRatio(_RECENT_S)
        self._recent_tokens = RecentRatio(_RECENT_S)
        self._queue_s = Buckets(_REQUEST_BUCKETS_S)
        self._prefill_s = Buckets(_REQUEST_BUCKETS_S)
        self._families = Families(model_name, with_vllm_names)
        self.registry: CollectorRegistry = registry_of(self)

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated for all sequences together, per second of steps."""
        return self._recent_tokens.per_s

    def observe_step(self, stats: EngineStats) -> None:
        """Take over the engine's numbers after a step, or while idle."""
        self._stats = stats
        if stats.num_steps == self._num_steps or stats.step_s <= 0:
            return
        self._num_steps = stats.num_steps
        kind = _DECODE if stats.step_is_decode else _PREFILL
        self._step_s[kind].observe(stats.step_s)
        self._read_bytes[kind] += stats.step_bytes
        self._recent_tokens.add(stats.step_tokens, stats.step_s)
        if stats.step_is_decode:
            self._recent_bytes.add(stats.step_bytes, stats.step_s)

    def observe_turn(self, duration_s: float) -> None:
        """After `observe_step`."""
        self.turn_s += duration_s
        self.host_s = self.turn_s - self._stats.wait_s

    def observe_exchange(self, exchange: Exchange, duration_s: float) -> None:
        self.exchange_s.observe(duration_s)
        self.recovered += exchange.num_recovered
        self.fenced += exchange.num_fenced
        self.quarantined += exchange.num_quarantined
        self.expired += exchange.num_expired

    def observe_request(self, metrics: RequestMetrics) -> None:
        self._queue_s.observe(metrics.queue_s)
        self._prefill_s.observe(metrics.prefill_s)

    def collect(self) -> Iterator[Metric]:
        yield from self._steps()
        yield from self._sequences()
        yield from self._blocks()
        yield from self._speculation()
        yield from self._losses()
        yield from self._facts()

    def _steps(self) -> Iterator[Metric]:
        new, stats = self._families, self._stats
        read_bytes = {(kind,): float(value) for kind, value in self._read_bytes.items()}
        yield from new.counter("nibble_engine_steps_total", "Steps computed.", stats.num_steps)
        yield from new.counter("nibble_prefill_tokens_total", "Prompt tokens computed.", stats.num_prompt_tokens)
        yield from new.counter("nibble_decode_tokens_total", "Tokens generated.", stats.num_generated_tokens)
        text = "Time of a step: with prompt tokens (prefill) or without (decode)."
        yield from new.histogram_by("kind", "nibble_engine_step_seconds", text, self._step_s)
        text = "Bytes that steps had to read at least: all weights, and the keys and values of each sequence."
        yield from new.counter_by(("kind",), "nibble_engine_read_bytes_total", text, read_bytes.items())
        text = "Bytes per second that the device reads from memory at best, measured at start."
        yield from new.gauge("nibble_read_bandwidth_bytes_per_second", text, self._read_bandwidth)
        text = "Bytes that recent decode steps had to read / their time / the measured read bandwidth."
        ratio = self._recent_bytes.per_s / self._read_bandwidth
        yield from new.gauge("nibble_bandwidth_utilization_ratio", text, ratio)
        yield from new.histogram("nibble_exchange_seconds", "Round trip to the broker, one per step.", self.exchange_s)
        text = "Time of all turns of the loop that had a step, its exchange with the broker included."
        yield from new.counter("nibble_turn_seconds_total", text, self.turn_s)
        text = "Of nibble_turn_seconds_total, what the host did not spend waiting for the device."
        yield from new.counter("nibble_host_seconds_total", text, self.host_s)

    def _sequences(self) -> Iterator[Metric]:
        new, stats = self._families, self._stats
        yield from new.gauge(
            "nibble_running_sequences", "Sequences with KV blocks.", stats.num_running, vllm="vllm:num_requests_running"
        )
        yield from new.gauge(
            "nibble_waiting_sequences",
            "Sequences waiting inside the engine.",
            stats.num_waiting,
            vllm="vllm:num_requests_waiting",
        )
        yield from new.histogram(
            "nibble_request_queue_seconds",
            "Request submitted to first scheduled.",
            self._queue_s,
            vllm="vllm:request_queue_time_seconds",
        )
        yield from new.histogram(
            "nibble_request_prefill_seconds",
            "Request first scheduled to first token.",
            self._prefill_s,
            vllm="vllm:request_prefill_time_seconds",
        )
        text = "Sequences preempted for want of KV blocks, or for more urgent ones."
        yield from new.counter(
            "nibble_preemptions_total", text, stats.num_preemptions, vllm="vllm:num_preemptions_total"
        )

    def _blocks(self) -> Iterator[Metric]:
        new, stats = self._families, self._stats
        text = "Share of the KV blocks in use."
        yield from new.gauge("nibble_kv_cache_usage_ratio", text, stats.kv_cache_usage, vllm="vllm:kv_cache_usage_perc")
        blocks = {
            ("used",): stats.num_blocks - stats.num_free_blocks,
            ("cached",): stats.num_cached_blocks,
            ("empty",): stats.num_free_blocks - stats.num_cached_blocks,
        }
        text = "KV blocks: in use, free but with a prefix that can be found, or empty."
        yield from new.gauge_by(("state",), "nibble_kv_blocks", text, blocks.items())
        swap = {
            ("used",): stats.num_used_swap_blocks,
            ("empty",): stats.num_swap_blocks - stats.num_used_swap_blocks,
        }
        text = "Blocks of the host's memory for preempted sequences."
        yield from new.gauge_by(("state",), "nibble_swap_blocks", text, swap.items())
        moves = {("out",): stats.num_swapped_out, ("in",): stats.num_swapped_in}
        text = "Sequences whose blocks went to the host's memory, or came back."
        yield from new.counter_by(("direction",), "nibble_swapped_sequences_total", text, moves.items())
        yield from new.counter(
            "nibble_prefix_cache_queries_total",
            "Prompt tokens looked up.",
            stats.num_cache_queries,
            vllm="vllm:prefix_cache_queries_total",
        )
        yield from new.counter(
            "nibble_prefix_cache_hits_total",
            "Prompt tokens found in the prefix cache.",
            stats.num_cache_hits,
            vllm="vllm:prefix_cache_hits_total",
        )

    def _speculation(self) -> Iterator[Metric]:
        new, stats = self._families, self._stats
        yield from new.counter(
            "nibble_draft_tokens_total",
            "Tokens guessed and verified.",
            stats.num_draft_tokens,
            vllm="vllm:spec_decode_num_draft_tokens_total",
        )
        yield from new.counter(
            "nibble_accepted_draft_tokens_total",
            "Of nibble_draft_tokens_total, those that were right.",
            stats.num_accepted_tokens,
            vllm="vllm:spec_decode_num_accepted_tokens_total",
        )

    def _losses(self) -> Iterator[Metric]:
        """The broker's counts are the deployment's; each goes to one worker, so their sum over workers is right."""
        for name, text, value in (
            ("nibble_nonfinite_logits_total", "Requests ended by NaN or Inf logits.", self._stats.num_nonfinite_logits),
            (
                "nibble_saturated_kv_total",
                "Numbers of keys and values beyond their channel's range (`quantize --kv channel`).",
                self._stats.num_saturated_kv,
            ),
            ("nibble_recovered_requests_total", "Requests queued again: their worker was lost.", self.recovered),
            ("nibble_fenced_appends_total", "Appends refused: another worker has the request by now.", self.fenced),
            ("nibble_quarantined_requests_total", "Requests given up after too many lost workers.", self.quarantined),
            ("nibble_expired_requests_total", "Requests that the broker ended at their deadline.", self.expired),
        ):
            yield from self._families.counter(name, text, value)

    def _facts(self) -> Iterator[Metric]:
        new = self._families
        yield from new.build_info("worker")
        yield from new.gauge("nibble_weight_bytes", "The model's weights in the device's memory.", self.weight_bytes)
        yield from new.gauge("nibble_kv_cache_bytes", "The KV cache in the device's memory.", self.kv_cache_bytes)
        if self.info is not None:
            values = [((self.info.worker_id, self.info.device), 1.0)]
            yield from new.gauge_by(("worker_id", "device"), "nibble_worker_info", "1, for what a worker is.", values)
