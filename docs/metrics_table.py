"""Writes the tables of all metrics in operations.md from what both processes export: `python docs/metrics_table.py`
(`make docs`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric

from nibble.engine.protocol import FinishReason
from nibble.service.broker.wire import BrokerStatus, ServerStatus, WorkerInfo
from nibble.service.gateway.broker_metrics import BrokerMetrics
from nibble.service.gateway.metrics import Ended, GatewayMetrics, Outcome
from nibble.service.gateway.usage import Usage
from nibble.service.worker.metrics import WorkerMetrics

PAGE = Path(__file__).with_name("operations.md")
BEGIN, END = "<!-- written by metrics_table.py -->\n", "<!-- end -->\n"
_OF_ALL = {"model_name", "le"}  # labels


def page() -> str:
    """The page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    lines = [*_table("Gateways", gateway_metrics()), *_table("Workers", worker_metrics())]
    return before + BEGIN + "\n".join(lines) + END + rest.partition(END)[2]


def gateway_metrics() -> list[Metric]:
    """Of a gateway that has answered a request with a key and knows its broker: all that there are."""
    gateway = GatewayMetrics("m", vllm_names=True)
    gateway.responses[200] += 1
    gateway.count_end(Ended("ada", Outcome.OK, [FinishReason.STOP], Usage(1, 1, 1), 1.0))
    gateway.broker = _known_broker()
    return list(gateway.collect())


def worker_metrics() -> list[Metric]:
    """Of a worker that is ready."""
    worker = WorkerMetrics("m", 1e9, with_vllm_names=True)
    worker.info = WorkerInfo(worker_id="w", model="m", device="d", state="ready")
    return list(worker.collect())


def name_of(metric: Metric) -> str:
    """As it is exported, but for the suffixes of a histogram's series."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _known_broker() -> BrokerMetrics:
    broker = BrokerMetrics()
    broker._status = BrokerStatus(num_queued=0, num_running=0, workers=())
    broker._server = ServerStatus(
        memory_used_bytes=1, memory_limit_bytes=2, num_clients=1, num_commands=1, num_evicted_keys=0
    )
    return broker


def _table(title: str, metrics: list[Metric]) -> Iterator[str]:
    others = {metric.documentation: name_of(metric) for metric in metrics if metric.name.startswith("vllm:")}
    yield f"### {title}\n"
    yield "| metric | type | labels | | vLLM's name |"
    yield "| --- | --- | --- | --- | --- |"
    for metric in metrics:
        if metric.name.startswith("vllm:"):
            continue
        labels = sorted({label for sample in metric.samples for label in sample.labels} - _OF_ALL)
        shown = ", ".join(f"`{label}`" for label in labels)
        other = f"`{others[metric.documentation]}`" if metric.documentation in others else ""
        yield f"| `{name_of(metric)}` | {metric.type} | {shown} | {metric.documentation} | {other} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page())
