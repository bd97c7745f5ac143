"""The worker's metrics: what the engine counted, under our names and the standard ones."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nibble.engine.stats import EngineStats
from nibble.service.worker.metrics import WorkerMetrics


def samples(metrics: WorkerMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


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
