"""What the rendered objects say: times, probes, selectors, secrets, security, networks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from charts import (
    CHART,
    EXTERNAL,
    KEDA,
    NAMESPACE,
    ROOT,
    Object,
    container,
    environment,
    one,
    pod,
    render,
    workloads,
)

from nibble.service.broker.keys import Keys

pytestmark = pytest.mark.helm

GPU = ("-f", str(CHART / "examples" / "single-gpu.yaml"))
ALL = [(), KEDA, EXTERNAL, GPU, ("-f", str(CHART / "examples" / "cpu-trial.yaml"))]


@pytest.fixture(params=ALL, ids=lambda values: Path(values[-1]).stem if values else "defaults")
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(*request.param)


def test_probes_ask_each_process_what_it_answers(objects: list[Object]) -> None:
    gateway, worker = (container(one(objects, "Deployment", name)) for name in ("gateway", "worker"))
    paths = {name: gateway[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    for name in ("startup", "liveness", "readiness"):
        assert worker[f"{name}Probe"]["httpGet"]["path"] == "/health"
    for process in (gateway, worker):
        (port,) = process["ports"]
        assert port["protocol"] == "TCP"
        assert {process[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "liveness", "readiness")} == {
            port["name"]
        }


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def labels_of_pods(objects: list[Object]) -> dict[str, dict[str, str]]:
    return {
        item["metadata"]["name"]: item["spec"].get("template", item)["metadata"]["labels"]
        for item in workloads(objects)
    }


def test_each_selector_finds_its_pods_and_no_others(objects: list[Object]) -> None:
    pods = labels_of_pods(objects)
    for item in objects:
        spec, kind = item.get("spec", {}), item["kind"]
        if kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            selector = spec["selector"]["matchLabels"]
        elif kind == "Service":
            selector = spec["selector"]
        elif kind == "NetworkPolicy":
            selector = spec["podSelector"]["matchLabels"]
        else:
            continue
        found = [name for name, labels in pods.items() if matches(selector, labels)]
        assert len(found) == 1, item["metadata"]["name"]
        assert item["metadata"]["labels"]["app.kubernetes.io/component"] in found[0]


def test_an_upgrade_changes_nothing_that_is_immutable(objects: list[Object]) -> None:
    """From the defaults to any of the examples."""
    before = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in render() if "spec" in item}
    for item in objects:
        old = before.get((item["kind"], item["metadata"]["name"]))
        if item["kind"] in ("Deployment", "StatefulSet"):
            assert old is not None, "a new name would make it anew"
            assert item["spec"]["selector"] == old["selector"]
            assert item["spec"].get("serviceName") == old.get("serviceName")
            assert not {name for name in old["selector"]["matchLabels"] if "version" in name or "chart" in name}


def test_monitors_find_their_services_and_ports() -> None:
    objects = render(*KEDA)
    for monitor in (item for item in objects if item["kind"] == "ServiceMonitor"):
        services = [
            item
            for item in objects
            if item["kind"] == "Service"
            and matches(monitor["spec"]["selector"]["matchLabels"], item["metadata"]["labels"])
        ]
        (service,), (endpoint,) = services, monitor["spec"]["endpoints"]
        assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_pods_are_nobody_and_write_to_volumes_alone(objects: list[Object]) -> None:
    for workload in workloads(objects):
        spec = pod(workload)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        for process in [*spec["containers"], *spec.get("initContainers", [])]:
            assert process["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in process["resources"]["limits"]


def test_volumes_that_are_mounted_are_there(objects: list[Object]) -> None:
    for workload in workloads(objects):
        spec = pod(workload)
        there = {volume["name"] for volume in spec.get("volumes", [])}
        there |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        mounted = [
            mount["name"]
            for process in [*spec["containers"], *spec.get("initContainers", [])]
            for mount in process.get("volumeMounts", [])
        ]
        assert set(mounted) == there


def test_the_model_is_prepared_where_processes_look_for_it(objects: list[Object]) -> None:
    for name in ("gateway", "worker"):
        spec = pod(one(objects, "Deployment", name))
        (prepare,) = spec["initContainers"]
        assert prepare["command"] == ["nibble", "prepare", "/models/served"]  # NIBBLE_MODEL_DIR of the images
        mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts["/models"]["readOnly"] is True
        assert {"name": mounts["/models"]["name"], "mountPath": "/models"} in prepare["volumeMounts"]


def test_gateways_and_workers_agree(objects: list[Object]) -> None:
    gateway, worker = (environment(one(objects, "Deployment", name)) for name in ("gateway", "worker"))
    for name in ("NIBBLE_REDIS_URL", "NIBBLE_NAMESPACE", "NIBBLE_MODEL_NAME"):
        assert gateway[name] == worker[name]


def test_secrets_are_only_referred_to() -> None:
    for values in ALL:
        objects = render(*values)
        assert not [item for item in objects if item["kind"] == "Secret"]
    gateway = environment(one(render(*KEDA), "Deployment", "gateway"))
    assert gateway["NIBBLE_API_KEYS"] == {"secretKeyRef": {"name": "nibble-keys", "key": "keys"}}
    assert gateway["NIBBLE_REDIS_URL"] == "redis://:$(REDIS_PASSWORD)@chat-nibble-redis:6379/0"
    names = list(gateway)
    assert names.index("REDIS_PASSWORD") < names.index("NIBBLE_REDIS_URL"), "the kubelet replaces only what came before"


def test_redis_is_reached_while_its_probe_fails() -> None:
    """It is the only one."""
    assert one(render(), "Service", "redis")["spec"]["publishNotReadyAddresses"] is True


def test_an_external_redis_replaces_the_bundled_one() -> None:
    objects = render(*EXTERNAL)
    assert not [item for item in objects if item["kind"] == "StatefulSet"]
    worker = environment(one(objects, "Deployment", "worker"))
    assert worker["NIBBLE_REDIS_URL"] == "rediss://nibble:$(REDIS_PASSWORD)@redis.example.com:6380/0"


def test_the_bundled_redis_asks_for_the_password_it_is_given() -> None:
    redis = container(one(render(*KEDA), "StatefulSet"))
    assert redis["args"][-2:] == ["--requirepass", "$(REDIS_PASSWORD)"]
    assert [entry["name"] for entry in redis["env"]] == ["REDIS_PASSWORD", "REDISCLI_AUTH"]


def test_a_cuda_worker_has_one_gpu() -> None:
    worker = one(render(*GPU), "Deployment", "worker")
    process = container(worker)
    assert process["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert process["resources"]["limits"]["memory"] == "16Gi"
    assert "worker-cuda" in process["image"]
    assert pod(worker)["runtimeClassName"] == "nvidia"
    assert pod(worker)["tolerations"]
    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_cpu_worker_has_the_threads_that_it_requests_and_no_gpu() -> None:
    worker = one(render(), "Deployment", "worker")
    assert environment(worker)["NIBBLE_NUM_THREADS"]["resourceFieldRef"]["resource"] == "requests.cpu"
    assert set(container(worker)["resources"]["limits"]) == {"memory"}
    given = one(render("--set", "worker.settings.NIBBLE_NUM_THREADS=3"), "Deployment", "worker")
    assert environment(given)["NIBBLE_NUM_THREADS"] == "3"


def test_what_is_scaled_has_no_fixed_number() -> None:
    objects = render(*KEDA)
    for name in ("gateway", "worker"):
        assert "replicas" not in one(objects, "Deployment", name)["spec"]
    scaler = one(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"]
    assert scaler == one(objects, "Deployment", "gateway")["metadata"]["name"]
    assert one(objects, "ScaledObject")["spec"]["scaleTargetRef"]["name"] == "chat-nibble-worker"


def test_keda_reads_the_queue_of_this_deployment() -> None:
    (trigger,) = one(render(*KEDA, "--set", "namespace=blue"), "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"] == {
        "address": f"chat-nibble-redis.{NAMESPACE}.svc:6379",
        "listName": Keys("blue").queue,
        "listLength": "32",
        "databaseIndex": "0",
    }
    assert trigger["authenticationRef"]["name"] == one(render(*KEDA), "TriggerAuthentication")["metadata"]["name"]


def test_where_workers_scale_from_zero_requests_wait_for_one() -> None:
    gateway = environment(one(render(*KEDA), "Deployment", "gateway"))
    assert gateway["NIBBLE_NEEDS_WORKER"] == "false"
    assert float(gateway["NIBBLE_NO_WORKER_TIMEOUT_S"]) >= 900
    assert "NIBBLE_NEEDS_WORKER" not in environment(one(render(), "Deployment", "gateway"))


def test_traces_go_where_they_are_told_from_gateways_and_workers() -> None:
    values = (
        *("--set", "tracing.endpoint=http://collector:4318", "--set", "tracing.headers.existingSecret=collector"),
        *("--set", "tracing.environment.OTEL_TRACES_SAMPLER_ARG=0.01"),
    )
    objects = render(*values)
    for name in ("gateway", "worker"):
        variables = environment(one(objects, "Deployment", name))
        assert variables["NIBBLE_TRACING"] == "true"
        assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
        assert variables["OTEL_EXPORTER_OTLP_HEADERS"] == {"secretKeyRef": {"name": "collector", "key": "headers"}}
        assert variables["OTEL_TRACES_SAMPLER_ARG"] == "0.01"
        assert not [key for key in environment(one(render(), "Deployment", name)) if "TRAC" in key or "OTEL" in key]


def test_a_file_of_keys_is_mounted_where_the_gateway_looks_for_it() -> None:
    values = ("--set", "gateway.apiKeys.existingSecret=nibble-keys", "--set", "gateway.apiKeys.fileKey=clients")
    gateway = one(render(*values), "Deployment", "gateway")
    path = Path(environment(gateway)["NIBBLE_API_KEYS_FILE"])
    (mount,) = [each for each in container(gateway)["volumeMounts"] if each["mountPath"] == str(path.parent)]
    assert "subPath" not in mount, "a change of the Secret would not be seen"
    (volume,) = [each for each in pod(gateway)["volumes"] if each["name"] == mount["name"]]
    assert volume["secret"]["secretName"] == "nibble-keys"
    assert volume["secret"]["items"] == [{"key": "clients", "path": path.name}]


def test_every_rule_and_dashboard_is_there() -> None:
    objects = render(*KEDA)
    groups = one(objects, "PrometheusRule")["spec"]["groups"]
    files = sorted((ROOT / "observability" / "prometheus" / "rules").glob("*.yml"))
    assert groups == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    dashboards = one(objects, "ConfigMap")["data"]
    shipped = {path.name: path for path in (ROOT / "observability" / "grafana" / "dashboards").glob("*.json")}
    assert set(dashboards) == set(shipped)
    for name, path in shipped.items():
        assert json.loads(dashboards[name]) == json.loads(path.read_text())


def test_the_test_of_a_release_is_sound_python_and_reaches_the_service(objects: list[Object]) -> None:
    test = one(objects, "Pod")
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test"
    compile(container(test)["args"][0], "test", "exec")
    service = next(item for item in objects if item["kind"] == "Service" and item["metadata"]["name"] == "chat-nibble")
    (port,) = service["spec"]["ports"]
    assert environment(test)["URL"] == f"http://chat-nibble:{port['port']}/v1/chat/completions"


def test_an_ingress_with_a_certificate_needs_no_host() -> None:
    values = ("--set", "gateway.ingress.enabled=true", "--set", "gateway.ingress.tlsSecret=cert")
    assert one(render(*values), "Ingress")["spec"]["tls"] == [{"secretName": "cert"}]
    hosts = one(render(*values, "--set", "gateway.ingress.host=a.example"), "Ingress")["spec"]["tls"][0]["hosts"]
    assert hosts == ["a.example"]


def test_images_are_pinned() -> None:
    for item in workloads(render()):
        for process in [*pod(item)["containers"], *pod(item).get("initContainers", [])]:
            assert re.search(r":[\w.-]*\d[\w.-]*$", process["image"])
