"""The queue, what was lost and recovered, Redis, and the gateway processes."""

from __future__ import annotations

from observability.dashboards.panels import Graph, Number, Page, Query, Row

_MODEL = 'model_name=~"$model"'
_PROCESS = f"on (instance) group_left (process) max by (instance, process) (nibble_build_info{{{_MODEL}}})"


def _most(metric: str) -> str:
    """Every gateway says the same of the broker."""
    return f"max by (model_name) ({metric}{{{_MODEL}}})"


def _rate(metric: str) -> str:
    return f"sum(rate({metric}{{{_MODEL}}}[$__rate_interval]))"


PAGE = Page(
    uid="nibble-broker",
    title="Nibble / Broker and gateways",
    text="What waits and for how long, what was lost and recovered, Redis, and the processes.",
    rows=(
        Row(
            "Now",
            (
                Number(
                    "Queued",
                    "Requests that wait for a worker.",
                    "none",
                    f"sum({_most('nibble_queued_requests')})",
                    ((100.0, "yellow"),),
                ),
                Number(
                    "Age of the queue",
                    "How long the request that is served next has been waiting.",
                    "s",
                    f"max({_most('nibble_queue_age_seconds')})",
                    ((5.0, "yellow"), (10.0, "red")),
                ),
                Number("With a worker", "Requests.", "none", f"sum({_most('nibble_leased_requests')})", base="blue"),
                Number(
                    "Gateways that reach Redis",
                    "",
                    "none",
                    f"sum(nibble_broker_up{{{_MODEL}}})",
                    ((1.0, "green"),),
                    base="red",
                ),
                Number(
                    "Memory of Redis",
                    "Of its limit: maxmemory, or the memory of its machine.",
                    "percentunit",
                    f"max(nibble:redis_memory:usage_ratio{{{_MODEL}}})",
                    ((0.6, "yellow"), (0.8, "red")),
                ),
            ),
        ),
        Row(
            "Queue and workers",
            (
                Graph(
                    "Queue",
                    "",
                    "none",
                    (
                        Query(_most("nibble_queued_requests"), "{{model_name}} queued"),
                        Query(_most("nibble_leased_requests"), "{{model_name}} with a worker"),
                    ),
                ),
                Graph(
                    "Age of the queue",
                    "Above 10 s for two minutes, someone is paged.",
                    "s",
                    (Query(_most("nibble_queue_age_seconds"), "{{model_name}}"),),
                ),
                Graph(
                    "Workers",
                    "With a live heartbeat.",
                    "none",
                    (Query(f"max by (model_name, state) (nibble_workers{{{_MODEL}}})", "{{model_name}} {{state}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Lost and found",
                    "Recovered: a worker was lost and another one went on. Fenced: what a lost one still sent was "
                    "refused. Restored: Redis had lost them.",
                    "ops",
                    (
                        Query(_rate("nibble_recovered_requests_total"), "recovered"),
                        Query(_rate("nibble_fenced_appends_total"), "fenced appends"),
                        Query(_rate("nibble_restored_requests_total"), "restored"),
                    ),
                ),
                Graph(
                    "Given up",
                    "Quarantined: too many workers were lost with it. Expired: past its deadline. Non-finite: NaN or "
                    "Inf logits.",
                    "ops",
                    (
                        Query(_rate("nibble_quarantined_requests_total"), "quarantined"),
                        Query(_rate("nibble_expired_requests_total"), "expired"),
                        Query(_rate("nibble_nonfinite_logits_total"), "non-finite logits"),
                    ),
                ),
                Graph(
                    "Refused and limited",
                    "Refused: the queue was full or nobody was there. Limited: over a key's quota.",
                    "reqps",
                    (
                        Query(
                            f'sum by (outcome) (rate(nibble_requests_total{{{_MODEL}, outcome=~"refused|limited"}}'
                            "[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                    ),
                    is_stacked=True,
                ),
            ),
        ),
        Row(
            "Redis",
            (
                Graph(
                    "Memory",
                    "It must be set to evict nothing.",
                    "bytes",
                    (
                        Query(_most("nibble_redis_memory_used_bytes"), "used"),
                        Query(_most("nibble_redis_memory_limit_bytes"), "limit"),
                    ),
                ),
                Graph(
                    "Commands",
                    "Scripts count as one each, and so do the commands in them.",
                    "ops",
                    (
                        Query(
                            f"max by (model_name) (rate(nibble_redis_commands_total{{{_MODEL}}}[$__rate_interval]))",
                            "{{model_name}}",
                        ),
                    ),
                ),
                Graph(
                    "Connections and evictions",
                    "",
                    "none",
                    (
                        Query(_most("nibble_redis_clients"), "connections"),
                        Query(_most("nibble_redis_evicted_keys_total"), "evicted keys"),
                    ),
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Graph(
                    "CPU",
                    "A gateway is one thread: near 1 it is the limit, add gateways.",
                    "percentunit",
                    (
                        Query(
                            f"rate(process_cpu_seconds_total[$__rate_interval]) * {_PROCESS}",
                            "{{process}} {{instance}}",
                        ),
                    ),
                ),
                Graph(
                    "Memory",
                    "",
                    "bytes",
                    (Query(f"process_resident_memory_bytes * {_PROCESS}", "{{process}} {{instance}}"),),
                ),
                Graph(
                    "Time since the start",
                    "A fall to 0 is a restart.",
                    "s",
                    (Query(f"(time() - process_start_time_seconds) * {_PROCESS}", "{{process}} {{instance}}"),),
                ),
                Graph(
                    "Versions",
                    "Processes of each; two during a rolling upgrade.",
                    "none",
                    (Query(f"count by (process, version) (nibble_build_info{{{_MODEL}}})", "{{process}} {{version}}"),),
                    is_stacked=True,
                ),
            ),
        ),
    ),
)
