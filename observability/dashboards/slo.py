"""Whether users get what they were promised, and what they get. The objectives are those of rules/slo.yml."""

from __future__ import annotations

from observability.dashboards.panels import Graph, Number, Page, Query, Row

_AVAILABILITY_BUDGET, _FIRST_TOKEN_BUDGET = 0.001, 0.05
_MODEL = 'model_name=~"$model"'
_BAD = f'nibble_requests_total{{{_MODEL}, outcome=~"refused|failed"}}'
_COUNTED = f'nibble_requests_total{{{_MODEL}, outcome=~"ok|refused|failed"}}'
_ENDED = f"sum(rate(nibble_e2e_request_latency_seconds_count{{{_MODEL}}}[$__rate_interval]))"
_BURN_COLORS = ((1.0, "yellow"), (6.0, "red"))


def _rate(metric: str) -> str:
    return f"sum(rate({metric}{{{_MODEL}}}[$__rate_interval]))"


def _quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({quantile}, sum by (le) (rate({metric}_bucket{{{_MODEL}}}[$__rate_interval])))",
            f"p{round(quantile * 100)}",
        )
        for quantile in (0.5, 0.95, 0.99)
    )


def _burns(record: str, budget: float) -> tuple[Query, ...]:
    return tuple(
        Query(f"{record}{window}{{{_MODEL}}} / {budget}", f"{{{{model_name}}}} over {window}")
        for window in ("5m", "1h", "6h")
    )


PAGE = Page(
    uid="nibble-slo",
    title="Nibble / SLO overview",
    text="Objectives: 99.9 % of requests neither refused nor failed; 95 % of first tokens within 2.5 s.",
    rows=(
        Row(
            "Objectives",
            (
                Number(
                    "Availability",
                    "Of the requests that the service is to blame for, those neither refused nor failed.",
                    "percentunit",
                    f"1 - sum(increase({_BAD}[$__range])) / sum(increase({_COUNTED}[$__range]))",
                    ((0.99, "yellow"), (0.999, "green")),
                    base="red",
                ),
                Number(
                    "First tokens within 2.5 s",
                    "Of all first tokens in the chosen time.",
                    "percentunit",
                    f'sum(increase(nibble_time_to_first_token_seconds_bucket{{{_MODEL}, le="2.5"}}[$__range]))'
                    f" / sum(increase(nibble_time_to_first_token_seconds_count{{{_MODEL}}}[$__range]))",
                    ((0.9, "yellow"), (0.95, "green")),
                    base="red",
                ),
                Number(
                    "Availability burn rate, 1 h",
                    "1 uses up a month's error budget in a month; 14.4 pages.",
                    "none",
                    f"nibble:requests:bad_ratio_rate1h{{{_MODEL}}} / {_AVAILABILITY_BUDGET}",
                    _BURN_COLORS,
                    "{{model_name}}",
                ),
                Number(
                    "First token burn rate, 1 h",
                    "1 uses up a month's error budget in a month; 14.4 pages.",
                    "none",
                    f"nibble:first_token:slow_ratio_rate1h{{{_MODEL}}} / {_FIRST_TOKEN_BUDGET}",
                    _BURN_COLORS,
                    "{{model_name}}",
                ),
                Number(
                    "Ready workers",
                    "As the gateways see them.",
                    "none",
                    f'max by (model_name) (nibble_workers{{{_MODEL}, state="ready"}})',
                    ((1.0, "green"),),
                    "{{model_name}}",
                    base="red",
                ),
            ),
        ),
        Row(
            "Traffic",
            (
                Graph(
                    "Requests by outcome",
                    "Refused and failed count against the objective. Rejected: the request was wrong. Limited: its "
                    "key's quota was used up. Aborted: by its client.",
                    "reqps",
                    (
                        Query(
                            f"sum by (outcome) (rate(nibble_requests_total{{{_MODEL}}}[$__rate_interval]))",
                            "{{outcome}}",
                        ),
                    ),
                    is_stacked=True,
                ),
                Graph(
                    "Ended choices by finish reason",
                    "",
                    "ops",
                    (
                        Query(
                            "sum by (finished_reason) "
                            f"(rate(nibble_request_success_total{{{_MODEL}}}[$__rate_interval]))",
                            "{{finished_reason}}",
                        ),
                    ),
                    is_stacked=True,
                ),
                Graph(
                    "HTTP responses",
                    "Of all URLs, probes and scrapes included.",
                    "reqps",
                    (
                        Query(
                            f"sum by (status) (rate(nibble_http_responses_total{{{_MODEL}}}[$__rate_interval]))",
                            "{{status}}",
                        ),
                    ),
                    is_stacked=True,
                ),
                Graph(
                    "Requests in flight",
                    "Waiting: without a first token, whether in the queue or in a worker.",
                    "none",
                    (
                        Query(f"sum(nibble_num_requests_running{{{_MODEL}}})", "running"),
                        Query(f"sum(nibble_num_requests_waiting{{{_MODEL}}})", "waiting"),
                    ),
                    is_stacked=True,
                ),
                Graph(
                    "Tokens of ended requests",
                    "Cached ones are part of the prompt's.",
                    "none",
                    (
                        Query(_rate("nibble_prompt_tokens_total"), "prompt"),
                        Query(_rate("nibble_cached_prompt_tokens_total"), "cached"),
                        Query(_rate("nibble_generation_tokens_total"), "generated"),
                    ),
                ),
                Graph(
                    "Tokens per request",
                    "Mean of ended requests.",
                    "none",
                    (
                        Query(f"{_rate('nibble_prompt_tokens_total')} / {_ENDED}", "prompt"),
                        Query(f"{_rate('nibble_generation_tokens_total')} / {_ENDED}", "generated"),
                    ),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Graph(
                    "Time to first token",
                    "From the request's arrival at a gateway.",
                    "s",
                    _quantiles("nibble_time_to_first_token_seconds"),
                ),
                Graph(
                    "Time between tokens",
                    "Of one choice. Tokens that come together share the time they took.",
                    "s",
                    _quantiles("nibble_inter_token_latency_seconds"),
                ),
                Graph(
                    "Time of whole requests",
                    "From arrival to the last token; long answers take long.",
                    "s",
                    _quantiles("nibble_e2e_request_latency_seconds"),
                ),
                Graph(
                    "In the queue",
                    "Submitted to first scheduled: what more workers would shorten.",
                    "s",
                    _quantiles("nibble_request_queue_seconds"),
                ),
                Graph(
                    "Prefill",
                    "First scheduled to first token: what shorter prompts or more cache hits would shorten.",
                    "s",
                    _quantiles("nibble_request_prefill_seconds"),
                ),
            ),
        ),
        Row(
            "Error budgets",
            (
                Graph(
                    "Burn rate of availability",
                    "Above 14.4 over 1 h, or 6 over 6 h, someone is paged.",
                    "none",
                    _burns("nibble:requests:bad_ratio_rate", _AVAILABILITY_BUDGET),
                ),
                Graph(
                    "Burn rate of the first token",
                    "Above 14.4 over 1 h, or 6 over 6 h, someone is paged.",
                    "none",
                    _burns("nibble:first_token:slow_ratio_rate", _FIRST_TOKEN_BUDGET),
                ),
            ),
        ),
    ),
)
