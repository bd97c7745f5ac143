"""From what a dashboard shows to Grafana's JSON. Nothing here knows a metric.

Queries may use `$model` (the chosen models, a regular expression), `$key` (API keys, where a page asks for them),
`$__rate_interval` and `$__range`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24  # of a page, in Grafana's columns
_GRAPH_HEIGHT, _NUMBER_HEIGHT = 8, 4


@dataclass(frozen=True)
class Query:
    """legend: a template over the labels of a series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Number:
    """The newest value of one query. steps: from which value on it is of which colour, rising; below them, green."""

    title: str
    text: str
    unit: str
    expr: str
    steps: tuple[tuple[float, str], ...] = ()
    legend: str = ""
    base: str = "green"


@dataclass(frozen=True)
class Graph:
    """Values over time. text: what it is, and what to look for."""

    title: str
    text: str
    unit: str
    queries: tuple[Query, ...]
    is_stacked: bool = False
    highest: float | None = None  # of the axis


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Number | Graph, ...]


@dataclass(frozen=True)
class Page:
    """One dashboard."""

    uid: str
    title: str
    text: str
    rows: tuple[Row, ...]
    has_keys: bool = False


def render(page: Page) -> str:
    """The file that Grafana reads."""
    builder = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .description(page.text)
        .tags(["nibble"])
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_variable("model", "Model", "label_values(nibble_build_info, model_name)"))
    )
    if page.has_keys:
        query = 'label_values(nibble_key_requests_total{model_name=~"$model"}, key)'
        builder = builder.with_variable(_variable("key", "API key", query))
    ids = itertools.count(1)
    for row in page.rows:
        builder = builder.with_row(dashboard.Row(row.title).id(next(ids)))
        for panel in row.panels:
            builder = builder.with_panel(_built(panel, _span(panel, row.panels)).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def queries_of(page: Page) -> list[str]:
    """Every query of its panels."""
    panels = [panel for row in page.rows for panel in row.panels]
    return [
        query
        for panel in panels
        for query in ([panel.expr] if isinstance(panel, Number) else [query.expr for query in panel.queries])
    ]


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(_DATASOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _span(panel: Number | Graph, row: Sequence[Number | Graph]) -> int:
    """All numbers of a row share a line; graphs come three in one, or two where that fills it."""
    same = sum(type(other) is type(panel) for other in row)
    if isinstance(panel, Number):
        return _WIDTH // same
    return _WIDTH // {1: 1, 2: 2, 4: 2}.get(same, 3)


def _built(panel: Number | Graph, span: int) -> stat.Panel | timeseries.Panel:
    return _number(panel, span) if isinstance(panel, Number) else _graph(panel, span)


def _number(panel: Number, span: int) -> stat.Panel:
    steps = [Threshold(value=None, color=panel.base), *(Threshold(value=at, color=color) for at, color in panel.steps)]
    return (
        stat.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(_DATASOURCE)
        .unit(panel.unit)
        .span(span)
        .height(_NUMBER_HEIGHT)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target(panel.expr, panel.legend, 0))
    )


def _graph(panel: Graph, span: int) -> timeseries.Panel:
    graph = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(_DATASOURCE)
        .unit(panel.unit)
        .span(span)
        .height(_GRAPH_HEIGHT)
        .min(0)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .fill_opacity(30 if panel.is_stacked else 0)
    )
    if panel.is_stacked:
        graph = graph.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if panel.highest is not None:
        graph = graph.max(panel.highest)
    for index, query in enumerate(panel.queries):
        graph = graph.with_target(_target(query.expr, query.legend, index))
    return graph


def _target(expr: str, legend: str, index: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expr).legend_format(legend or "__auto").ref_id(chr(ord("A") + index)).range()
