"""Who uses how much: by the names in the file of API keys. Empty where no key is asked for."""

from __future__ import annotations

from observability.dashboards.panels import Graph, Number, Page, Query, Row

_KEY = 'model_name=~"$model", key=~"$key"'


def _tokens(by: str, kind: str) -> str:
    return f'sum by ({by}) (rate(nibble_key_tokens_total{{{_KEY}, kind=~"{kind}"}}[$__rate_interval]))'


PAGE = Page(
    uid="nibble-tenants",
    title="Nibble / Tenants",
    text="Usage by API key.",
    has_keys=True,
    rows=(
        Row(
            "In the chosen time",
            (
                Number(
                    "Requests",
                    "",
                    "none",
                    f"sum by (key) (increase(nibble_key_requests_total{{{_KEY}}}[$__range]))",
                    legend="{{key}}",
                    base="blue",
                ),
                Number(
                    "Prompt tokens",
                    "Cached ones included.",
                    "none",
                    f'sum by (key) (increase(nibble_key_tokens_total{{{_KEY}, kind="prompt"}}[$__range]))',
                    legend="{{key}}",
                    base="blue",
                ),
                Number(
                    "Generated tokens",
                    "",
                    "none",
                    f'sum by (key) (increase(nibble_key_tokens_total{{{_KEY}, kind="generation"}}[$__range]))',
                    legend="{{key}}",
                    base="blue",
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Graph(
                    "Requests",
                    "",
                    "reqps",
                    (Query(f"sum by (key) (rate(nibble_key_requests_total{{{_KEY}}}[$__rate_interval]))", "{{key}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Requests by outcome",
                    "Limited: over the key's quota.",
                    "reqps",
                    (
                        Query(
                            f"sum by (key, outcome) (rate(nibble_key_requests_total{{{_KEY}}}[$__rate_interval]))",
                            "{{key}} {{outcome}}",
                        ),
                    ),
                    is_stacked=True,
                ),
                Graph(
                    "Prompt tokens",
                    "",
                    "none",
                    (Query(_tokens("key", "prompt"), "{{key}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Generated tokens",
                    "",
                    "none",
                    (Query(_tokens("key", "generation"), "{{key}}"),),
                    is_stacked=True,
                ),
                Graph(
                    "Found in a cache",
                    "Share of the key's prompt tokens.",
                    "percentunit",
                    (Query(f"{_tokens('key', 'cached')} / {_tokens('key', 'prompt')}", "{{key}}"),),
                    highest=1,
                ),
                Graph(
                    "Share of all tokens",
                    "Prompt and generated.",
                    "percentunit",
                    (
                        Query(
                            f"{_tokens('key', 'prompt|generation')} / on () group_left ()"
                            f" {_tokens('', 'prompt|generation')}",
                            "{{key}}",
                        ),
                    ),
                    highest=1,
                ),
            ),
        ),
    ),
)
