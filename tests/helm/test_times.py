"""How long Kubernetes waits for processes to start and to end."""

from __future__ import annotations

import pytest
from charts import container, environment, one, pod, render

from nibble.service.gateway.__main__ import _CLOSING_S

pytestmark = pytest.mark.helm


@pytest.mark.parametrize("drain_s", [0, 30, 600])
def test_a_gateway_gets_the_time_it_drains_for(drain_s: int) -> None:
    gateway = one(
        render("--set", f"gateway.drainSeconds={drain_s}", "--set", "gateway.preStopSeconds=7"), "Deployment", "gateway"
    )
    assert container(gateway)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert environment(gateway)["NIBBLE_DRAIN_S"] == str(drain_s)
    assert pod(gateway)["terminationGracePeriodSeconds"] >= 7 + drain_s + _CLOSING_S


@pytest.mark.parametrize("startup_s", [1, 899, 3600])
def test_a_worker_gets_the_time_it_loads_for(startup_s: int) -> None:
    worker = one(render("--set", f"worker.startupSeconds={startup_s}"), "Deployment", "worker")
    probe = container(worker)["startupProbe"]
    assert startup_s <= probe["periodSeconds"] * probe["failureThreshold"] < startup_s + 5
    assert worker["spec"]["progressDeadlineSeconds"] > startup_s


def test_gateways_are_not_given_up_while_a_worker_loads() -> None:
    """They are ready once one is. helm 4's `--wait` fails as soon as a Deployment does."""
    for more in ((), ("--set", "worker.startupSeconds=3600"), ("--set", "gateway.startupSeconds=3600")):
        objects = render(*more)
        deadlines = [
            one(objects, "Deployment", name)["spec"].get("progressDeadlineSeconds") for name in ("gateway", "worker")
        ]
        assert deadlines[0] == deadlines[1] >= (4200 if more else 1500)


def test_a_process_that_is_slow_to_answer_is_not_ended() -> None:
    """A second, the default, is short on a busy node; and a command takes a process there, before it asks anything."""
    for workload in (item for item in render() if item["kind"] in ("Deployment", "StatefulSet")):
        process = container(workload)
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert process[name].get("timeoutSeconds", 1) >= 5, workload["metadata"]["name"]
        liveness = process["livenessProbe"]
        patience_s = liveness["periodSeconds"] * liveness.get("failureThreshold", 3)
        assert patience_s >= (60 if "exec" in liveness else 30)
