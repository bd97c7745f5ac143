"""How near decode comes to what the device's memory allows: docs/operations.md says what the ratio is."""

from __future__ import annotations

from observability.dashboards.panels import Graph, Number, Page, Query, Row

_MODEL = 'model_name=~"$model"'
_DECODE = f'{_MODEL}, kind="decode"'
_BYTES = f"sum by (instance) (rate(nibble_engine_read_bytes_total{{{_DECODE}}}[$__rate_interval]))"
_SECONDS = f"sum by (instance) (rate(nibble_engine_step_seconds_sum{{{_DECODE}}}[$__rate_interval]))"
_STEPS = f"sum by (instance) (rate(nibble_engine_step_seconds_count{{{_DECODE}}}[$__rate_interval]))"
_ROOF = f"max by (instance) (nibble_read_bandwidth_bytes_per_second{{{_MODEL}}})"

PAGE = Page(
    uid="nibble-roof",
    title="Nibble / GPU roof",
    text="Decode is bound by memory: the bytes that a step must read, over the measured bandwidth, is its least time.",
    rows=(
        Row(
            "Utilisation of the memory bandwidth",
            (
                Number(
                    "Devices",
                    "Workers of each kind of device.",
                    "none",
                    f"count by (device) (nibble_worker_info{{{_MODEL}}})",
                    legend="{{device}}",
                    base="blue",
                ),
                Number(
                    "Now",
                    "Of the last second of decode steps.",
                    "percentunit",
                    f"avg(nibble_bandwidth_utilization_ratio{{{_MODEL}}})",
                    ((0.4, "yellow"), (0.7, "green")),
                    base="red",
                ),
                Number(
                    "Last 5 minutes",
                    "Of all decode steps.",
                    "percentunit",
                    f"avg(nibble:bandwidth_utilization:ratio_rate5m{{{_MODEL}}})",
                    ((0.4, "yellow"), (0.7, "green")),
                    base="red",
                ),
                Number("Measured roof", "What a kernel that only reads reaches.", "Bps", f"avg({_ROOF})", base="blue"),
            ),
        ),
        Row(
            "Decode",
            (
                Graph(
                    "Utilisation",
                    "Bytes that decode steps had to read / their time / the measured bandwidth.",
                    "percentunit",
                    (Query(f"{_BYTES} / {_SECONDS} / {_ROOF}", "{{instance}}"),),
                    highest=1,
                ),
                Graph(
                    "Bandwidth",
                    "",
                    "Bps",
                    (Query(f"{_BYTES} / {_SECONDS}", "{{instance}}"), Query(_ROOF, "{{instance}} roof")),
                ),
                Graph(
                    "Time of a step",
                    "Mean, and the time to read what it must.",
                    "s",
                    (
                        Query(f"{_SECONDS} / {_STEPS}", "{{instance}}"),
                        Query(f"{_BYTES} / {_STEPS} / {_ROOF}", "{{instance}} least"),
                    ),
                ),
                Graph(
                    "Bytes per step",
                    "Above the weights: keys and values of all sequences.",
                    "bytes",
                    (
                        Query(f"{_BYTES} / {_STEPS}", "{{instance}}"),
                        Query(f"sum by (instance) (nibble_weight_bytes{{{_MODEL}}})", "{{instance}} weights"),
                    ),
                ),
                Graph(
                    "Where the time goes",
                    "Seconds per second: in steps of either kind, and the host's part of the turns, most of which lies "
                    "beside the device's work.",
                    "percentunit",
                    (
                        Query(
                            f"sum by (instance, kind) (rate(nibble_engine_step_seconds_sum{{{_MODEL}}}"
                            "[$__rate_interval]))",
                            "{{instance}} {{kind}}",
                        ),
                        Query(
                            f"sum by (instance) (rate(nibble_host_seconds_total{{{_MODEL}}}[$__rate_interval]))",
                            "{{instance}} host",
                        ),
                    ),
                ),
                Graph(
                    "Exchange with the broker",
                    "One per step; the device works meanwhile, if the exchange is not longer than the step.",
                    "s",
                    tuple(
                        Query(
                            f"histogram_quantile({quantile}, sum by (le) (rate(nibble_exchange_seconds_bucket"
                            f"{{{_MODEL}}}[$__rate_interval])))",
                            f"p{round(quantile * 100)}",
                        )
                        for quantile in (0.5, 0.99)
                    ),
                ),
            ),
        ),
    ),
)
