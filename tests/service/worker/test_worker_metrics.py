"""The worker's metrics: what the engine counted, under our names and the standard ones."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promtool import lint, needs_promtool

from nibble.engine.protocol import RequestMetrics
from nibble.engine.stats import EngineStats
from nibble.service.broker.wire import Exchange, WorkerInfo
from nibble.service.worker.metrics import WorkerMetrics


def samples(metrics: WorkerMetrics) -> dict[str, float]:
    """Name, or name/value of the label beside the model's -> value."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name not in ("model_name", "le")]
            found["/".join([sample.name, *labels])] = sample.value
    return found


def step(metrics: WorkerMetrics, stats: EngineStats, num_bytes: int, step_s: float, tokens: int, decode: bool) -> None:
    stats.num_steps += 1
    stats.step_bytes, stats.step_s, stats.step_tokens, stats.step_is_decode = num_bytes, step_s, tokens, decode
    metrics.observe_step(stats)


@pytest.mark.parametrize("with_vllm_names", [True, False])
def test_counters_are_those_of_the_engine(with_vllm_names: bool) -> None:
    metrics, stats = WorkerMetrics("m", 1e9, with_vllm_names), EngineStats()
    for queries, hits in ((100, 0), (250, 128)):
        stats.num_cache_queries, stats.num_cache_hits = queries, hits
        stats.num_draft_tokens, stats.num_accepted_tokens = 3 * queries, queries
        metrics.observe_step(stats)
    found = samples(metrics)
    drafts = [found[f"nibble_{name}_total"] for name in ("draft_tokens", "accepted_draft_tokens")]
    standard = [found.get(f"vllm:spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")]
    assert (drafts, standard) == ([750, 250], [750, 250] if with_vllm_names else [None, None])
    assert (found["nibble_prefix_cache_queries_total"], found["nibble_prefix_cache_hits_total"]) == (250, 128)
    standard = [found.get(f"vllm:prefix_cache_{name}_total") for name in ("queries", "hits")]
    assert standard == ([250, 128] if with_vllm_names else [None, None])


def test_utilisation_of_bandwidth_is_that_of_decode_steps() -> None:
    """A step that must read 8 MB takes 8 ms at 1 GB/s; here it took 10."""
    metrics, stats = WorkerMetrics("m", 1e9, False), EngineStats()
    for _ in range(50):
        step(metrics, stats, 8_000_000, 0.01, 1, decode=True)
        step(metrics, stats, 8_000_000, 0.5, 1, decode=False)
    found = samples(metrics)
    assert found["nibble_bandwidth_utilization_ratio"] == pytest.approx(0.8)
    assert found["nibble_engine_read_bytes_total/decode"] == found["nibble_engine_read_bytes_total/prefill"] == 4e8
    assert found["nibble_engine_step_seconds_sum/decode"] == pytest.approx(0.5)
    assert found["nibble_engine_step_seconds_count/prefill"] == 50


def test_utilisation_follows_what_changes() -> None:
    metrics, stats = WorkerMetrics("m", 1e9, False), EngineStats()
    for ratio in (0.9, 0.3):
        for _ in range(500):  # 5 s
            step(metrics, stats, int(ratio * 1e7), 0.01, 1, decode=True)
        assert samples(metrics)["nibble_bandwidth_utilization_ratio"] == pytest.approx(ratio, abs=0.01)


def test_a_turn_without_a_new_step_is_not_counted_twice() -> None:
    metrics, stats = WorkerMetrics("m", 1e9, False), EngineStats()
    step(metrics, stats, 1, 0.01, 1, decode=True)
    metrics.observe_step(stats)  # an asynchronous engine has launched a step, and read none
    assert samples(metrics)["nibble_engine_step_seconds_count/decode"] == 1


def test_tokens_per_s_counts_accepted_drafts_too() -> None:
    """Two sequences, of which a step of 10 ms gave one token and four."""
    metrics, stats = WorkerMetrics("m", 1e9, False), EngineStats(num_running=2)
    assert metrics.tokens_per_s == 0
    for _ in range(3):
        step(metrics, stats, 1, 0.01, 5, decode=True)
    assert metrics.tokens_per_s == pytest.approx(500)


def test_the_hosts_time_is_what_it_does_not_wait() -> None:
    metrics, stats = WorkerMetrics("m", 1e9, False), EngineStats()
    for _ in range(2):
        stats.wait_s += 0.006
        metrics.observe_step(stats)
        assert samples(metrics)["nibble_host_seconds_total"] >= 0, "it never falls within a turn"
        metrics.observe_turn(0.01)
    found = samples(metrics)
    assert found["nibble_turn_seconds_total"] == pytest.approx(0.02)
    assert found["nibble_host_seconds_total"] == pytest.approx(0.008)


def test_what_the_broker_counted_is_added_up() -> None:
    metrics = WorkerMetrics("m", 1e9, False)
    counts = {"num_recovered": 3, "num_fenced": 2, "num_quarantined": 1, "num_expired": 4}
    for _ in range(2):
        metrics.observe_exchange(Exchange(assignments=[], dropped=[], **counts), 0.002)
    found = samples(metrics)
    names = ("recovered_requests", "fenced_appends", "quarantined_requests", "expired_requests")
    assert [found[f"nibble_{name}_total"] for name in names] == [6, 4, 2, 8]
    assert found["nibble_exchange_seconds_count"] == 2


def full(with_vllm_names: bool) -> WorkerMetrics:
    """Every metric has a sample."""
    metrics = WorkerMetrics("m", 1e9, with_vllm_names)
    metrics.info = WorkerInfo(worker_id="w", model="m", device="NVIDIA H100", state="ready")
    step(metrics, EngineStats(num_blocks=8, num_free_blocks=5, num_cached_blocks=2), 1, 0.01, 1, decode=True)
    request = RequestMetrics(
        prompt_tokens=1, cached_tokens=0, generated_tokens=1, queue_s=0.1, prefill_s=0.1, decode_s=0.1
    )
    metrics.observe_request(request)
    return metrics


def test_blocks_are_used_cached_or_empty() -> None:
    found = samples(full(False))
    assert [found[f"nibble_kv_blocks/{state}"] for state in ("used", "cached", "empty")] == [3, 2, 3]


@needs_promtool
def test_promtool_finds_fault_with_the_colon_of_standard_names_alone() -> None:
    assert lint(generate_latest(full(False).registry).decode()) == []
    found = lint(generate_latest(full(True).registry).decode())
    assert found
    assert not [line for line in found if not (line.startswith("vllm:") and "':'" in line)]


def test_names_have_a_prefix_and_series_are_few() -> None:
    lines = [line for line in generate_latest(full(True).registry).decode().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not line.startswith(("nibble_", "vllm:", "process_"))]
    assert len(lines) < 250, "per worker, whatever it serves"
