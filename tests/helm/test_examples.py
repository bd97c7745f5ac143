"""What the examples promise of themselves."""

from __future__ import annotations

import pytest
from charts import CHART, Object, pod, render, workloads

pytestmark = pytest.mark.helm

NODE_CPU, SYSTEM_CPU = 2.0, 0.4  # of a small node, and of what every cluster runs on it


def cpu(quantity: str) -> float:
    return float(quantity.removesuffix("m")) / (1000 if quantity.endswith("m") else 1)


def requested_cpu(workload: Object) -> float:
    """As the scheduler sees a pod: its init containers run one after the other, and before the rest."""
    spec = pod(workload)
    containers, first = (
        [cpu(each["resources"]["requests"]["cpu"]) for each in spec.get(kind, [])]
        for kind in ("containers", "initContainers")
    )
    return max([sum(containers), *first])


def test_the_trial_fits_on_a_small_node_while_it_is_upgraded_too() -> None:
    """A pod that finds no room waits, and `--wait` with it."""
    objects = render("-f", str(CHART / "examples" / "cpu-trial.yaml"))
    total = 0.0
    for workload in workloads(objects):
        rolling = workload["spec"].get("strategy", {}).get("rollingUpdate", {})
        total += requested_cpu(workload) * (workload["spec"].get("replicas", 1) + rolling.get("maxSurge", 0))
    assert total <= NODE_CPU - SYSTEM_CPU
