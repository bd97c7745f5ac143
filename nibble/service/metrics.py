"""What the metrics of all processes are made of, for Prometheus.

A process keeps plain numbers and `Buckets`; `Families` says at a scrape how they are called. Values that existing
dashboards and autoscalers read under names of vLLM are exported under both names. promtool finds fault with the colon
in those, and with nothing else. docs/operations.md lists all metrics.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from nibble.service.version import nibble_version

Samples = Collection[tuple[tuple[str, ...], float]]  # values of labels, value


class Buckets:
    """A histogram. prometheus_client's costs several microseconds an observation; this one is on the token path."""

    def __init__(self, upper_bounds: Sequence[float]) -> None:
        self._upper_bounds = upper_bounds
        self._counts = [0] * (len(upper_bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._upper_bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        total = 0
        cumulative = []
        for bound, count in zip([*map(str, self._upper_bounds), "+Inf"], self._counts, strict=True):
            total += count
            cumulative.append((bound, total))
        family.add_metric(labels, buckets=cumulative, sum_value=self._sum)


class RecentRatio:
    """One quantity per second of busy time, over about the last window_s of it; 0 before the first `add`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._amount = 0.0
        self._duration_s = 0.0

    def add(self, amount: float, duration_s: float) -> None:
        kept = math.exp(-duration_s / self._window_s)
        self._amount = self._amount * kept + amount
        self._duration_s = self._duration_s * kept + duration_s

    @property
    def per_s(self) -> float:
        return self._amount / self._duration_s if self._duration_s else 0.0


@dataclass(frozen=True)
class Families:
    """Makes the metric families of one process, each labelled with its model. vllm: a second name; '' for none."""

    model_name: str
    with_vllm_names: bool

    def counter(self, name: str, text: str, value: float, *, vllm: str = "") -> Iterator[Metric]:
        for each in self._names(name, vllm):
            family = CounterMetricFamily(each, text, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family

    def counter_by(
        self, labels: Sequence[str], name: str, text: str, values: Samples, *, vllm: str = ""
    ) -> Iterator[Metric]:
        for each in self._names(name, vllm):
            family = CounterMetricFamily(each, text, labels=["model_name", *labels])
            for key, value in values:
                family.add_metric([self.model_name, *key], value)
            yield family

    def gauge(self, name: str, text: str, value: float, *, vllm: str = "") -> Iterator[Metric]:
        for each in self._names(name, vllm):
            family = GaugeMetricFamily(each, text, labels=["model_name"])
            family.add_metric([self.model_name], value)
            yield family

    def gauge_by(self, labels: Sequence[str], name: str, text: str, values: Samples) -> Iterator[Metric]:
        family = GaugeMetricFamily(name, text, labels=["model_name", *labels])
        for key, value in values:
            family.add_metric([self.model_name, *key], value)
        yield family

    def histogram(self, name: str, text: str, buckets: Buckets, *, vllm: str = "") -> Iterator[Metric]:
        for each in self._names(name, vllm):
            family = HistogramMetricFamily(each, text, labels=["model_name"])
            buckets.add_to(family, [self.model_name])
            yield family

    def histogram_by(self, label: str, name: str, text: str, buckets: Mapping[str, Buckets]) -> Iterator[Metric]:
        """buckets: label value -> histogram."""
        family = HistogramMetricFamily(name, text, labels=["model_name", label])
        for value, each in buckets.items():
            each.add_to(family, [self.model_name, value])
        yield family

    def build_info(self, process: str) -> Iterator[Metric]:
        """Which version runs where: what a rolling upgrade changes one by one."""
        values = [((process, nibble_version()), 1.0)]
        yield from self.gauge_by(("process", "version"), "nibble_build_info", "1, for the version that runs.", values)

    def _names(self, name: str, vllm: str) -> tuple[str, ...]:
        return (name, vllm) if vllm and self.with_vllm_names else (name,)


def registry_of(collector: Collector) -> CollectorRegistry:
    """A process's own metrics, and `process_*`: memory, CPU, descriptors, the time of its start."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    return registry
