"""What workers do: batches, steps, KV blocks, cache, speculation."""

from __future__ import annotations

from observability.dashboards.panels import Graph, Number, Page, Query, Row

_MODEL = 'model_name=~"$model"'


def _rate(metric: str, by: str = "", **labels: str) -> str:
    chosen = ", ".join([_MODEL, *(f'{name}="{value}"' for name, value in labels.items())])
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{{{chosen}}}[$__rate_interval]))"


def _step_quantile(quantile: float) -> Query:
    steps = f"sum by (le, kind) (rate(nibble_engine_step_seconds_bucket{{{_MODEL}}}[$__rate_interval]))"
    return Query(f"histogram_quantile({quantile}, {steps})", f"{{{{kind}}}} p{round(quantile * 100)}")


PAGE = Page(
    uid="nibble-engine",
    title="Nibble / Engine and KV cache",
    text="Continuous batching, the paged KV cache and speculation, of all workers.",
    rows=(
        Row(
            "Now",
            (
                Number("Running", "Sequences.", "none", f"sum(nibble_running_sequences{{{_MODEL}}})"),
                Number(
                    "Waiting in engines",
                    "For KV blocks or room in the batch; those in the broker's queue are not among them.",
                    "none",
                    f"sum(nibble_waiting_sequences{{{_MODEL}}})",
                    ((1.0, "yellow"),),
                ),
                Number(
                    "Fullest KV cache",
                    "Share of its blocks in use.",
                    "percentunit",
                    f"max(nibble_kv_cache_usage_ratio{{{_MODEL}}})",
                    ((0.8, "yellow"), (0.95, "red")),
                ),
                Number(
                    "Generated tokens/s", "Of all workers.", "none", _rate("nibble_decode_tokens_total"), base="blue"
                ),
                Number(
                    "Prefix cache hits",
                    "Share of prompt tokens found computed.",
                    "percentunit",
                    f"{_rate('nibble_prefix_cache_hits_total')} / {_rate('nibble_prefix_cache_queries_total')}",
                    base="blue",
                ),
            ),
        ),
        Row(
            "Batches and steps",
            (
                Graph(
                    "Sequences",
                    "",
                    "none",
                    (
                        Query(f"nibble_running_sequences{{{_MODEL}}}", "{{instance}} running"),
                        Query(f"nibble_waiting_sequences{{{_MODEL}}}", "{{instance}} waiting"),
                    ),
                ),
                Graph(
                    "Tokens per second",
                    "Computed: prompt tokens found in the cache are not among them.",
                    "none",
                    (
                        Query(_rate("nibble_prefill_tokens_total"), "prompt"),
                        Query(_rate("nibble_decode_tokens_total"), "generated"),
                    ),
                ),
                Graph(
                    "Time of a step",
                    "With prompt tokens (prefill) or without (decode).",
                    "s",
                    (_step_quantile(0.5), _step_quantile(0.99)),
                ),
                Graph(
                    "Tokens per step",
                    "Generated: about the size of the batch, and more with accepted drafts.",
                    "none",
                    (
                        Query(
                            f"{_rate('nibble_decode_tokens_total', 'instance')}"
                            f" / {_rate('nibble_engine_steps_total', 'instance')}",
                            "{{instance}}",
                        ),
                    ),
                ),
                Graph(
                    "Host's share of the time",
                    "Of turns with a step, what the host does not wait for the device. Near 1 on a GPU: the host is "
                    "the limit. On a CPU it is the device itself.",
                    "percentunit",
                    (
                        Query(
                            f"{_rate('nibble_host_seconds_total', 'instance')}"
                            f" / {_rate('nibble_turn_seconds_total', 'instance')}",
                            "{{instance}}",
                        ),
                    ),
                    highest=1,
                ),
                Graph(
                    "Steps by kind",
                    "",
                    "ops",
                    (Query(_rate("nibble_engine_step_seconds_count", "kind"), "{{kind}}"),),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "KV cache",
            (
                Graph(
                    "Blocks",
                    "Cached ones are free, and hold a prefix that can still be found.",
                    "none",
                    (Query(f"sum by (state) (nibble_kv_blocks{{{_MODEL}}})", "{{state}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Usage",
                    "",
                    "percentunit",
                    (Query(f"nibble_kv_cache_usage_ratio{{{_MODEL}}}", "{{instance}}"),),
                    highest=1,
                ),
                Graph(
                    "Prefix cache",
                    "Prompt tokens looked up, and found.",
                    "none",
                    (
                        Query(_rate("nibble_prefix_cache_queries_total"), "looked up"),
                        Query(_rate("nibble_prefix_cache_hits_total"), "found"),
                    ),
                ),
                Graph(
                    "Preemptions",
                    "Sequences that lost their blocks to others; those that went to the host's memory are not computed "
                    "again.",
                    "ops",
                    (
                        Query(_rate("nibble_preemptions_total"), "preempted"),
                        Query(_rate("nibble_swapped_sequences_total", "direction"), "swapped {{direction}}"),
                    ),
                ),
                Graph(
                    "Swap space",
                    "Blocks of the host's memory.",
                    "none",
                    (Query(f"sum by (state) (nibble_swap_blocks{{{_MODEL}}})", "{{state}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Saturated numbers",
                    "Of keys and values, beyond the range that their channel had in calibration.",
                    "none",
                    (Query(_rate("nibble_saturated_kv_total"), "saturated"),),
                ),
                Graph(
                    "Memory of the device",
                    "",
                    "bytes",
                    (
                        Query(f"sum(nibble_weight_bytes{{{_MODEL}}})", "weights"),
                        Query(f"sum(nibble_kv_cache_bytes{{{_MODEL}}})", "KV cache"),
                    ),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Speculation",
            (
                Graph(
                    "Acceptance",
                    "Of the drafts that were verified, those that were right.",
                    "percentunit",
                    (
                        Query(
                            f"{_rate('nibble_accepted_draft_tokens_total')} / {_rate('nibble_draft_tokens_total')}",
                            "accepted",
                        ),
                    ),
                    highest=1,
                ),
                Graph(
                    "Drafts",
                    "",
                    "none",
                    (
                        Query(_rate("nibble_draft_tokens_total"), "verified"),
                        Query(_rate("nibble_accepted_draft_tokens_total"), "accepted"),
                    ),
                ),
            ),
        ),
    ),
)
