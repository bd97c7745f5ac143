"""The chart over a matrix of values: helm 3 and 4, three versions of Kubernetes, the operators' CRDs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from charts import CHART, EXAMPLES, HELMS, NAMESPACE, helm, refusal, render, validate_operators

pytestmark = pytest.mark.helm

KUBERNETES = ("1.25", "1.31", "1.37")
ALL_ON = (
    "-f",
    str(CHART / "examples" / "keda.yaml"),
    "--set",
    "networkPolicy.clients[0].namespaceSelector.matchLabels.a=b",
)
MATRIX: dict[str, tuple[str, ...]] = {
    "defaults": (),
    **{path.stem: ("-f", str(path)) for path in EXAMPLES},
    "all": ALL_ON,
    "no policies": ("--set", "networkPolicy.enabled=false"),
    "claims of others": ("--set", "model.volume.existingClaim=m", "--set", "worker.kernelCache.existingClaim=k"),
    "own account": ("--set", "serviceAccount.create=false", "--set", "serviceAccount.name=mine"),
    "traces and a file of keys": (
        *(
            "--set",
            "tracing.endpoint=http://collector:4318",
            "--set",
            "tracing.environment.OTEL_TRACES_SAMPLER=always_on",
        ),
        *("--set", "tracing.headers.existingSecret=c"),
        *("--set", "gateway.apiKeys.existingSecret=k", "--set", "gateway.apiKeys.fileKey=f"),
    ),
    "nobody": ("--set-json", "networkPolicy.monitoring=[]", "--set-json", "networkPolicy.modelEgress=[]"),
    "CUDA and threads": ("--set", "worker.device=cuda", "--set", "worker.settings.NIBBLE_NUM_THREADS=2"),
}


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_helm_renders_and_lints_it(version: int, values: tuple[str, ...]) -> None:
    done = helm(version, "lint", "--strict", str(CHART), *values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert render(*values, version=version)


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_both_helms_render_the_same(values: tuple[str, ...]) -> None:
    assert render(*values, version=3) == render(*values, version=4)


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX)
def test_kubernetes_knows_every_object_and_field(kubernetes: str, values: tuple[str, ...], tmp_path: Path) -> None:
    native = [item for item in render(*values) if item["apiVersion"].split("/")[0] not in OPERATORS]
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(native))
    beside = Path(sys.executable).parent  # where requirements/deploy.txt has put it
    command = shutil.which("kubernetes-validate", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert command, "pip install -r requirements/deploy.txt"
    options = ["--strict", "--kubernetes-version", kubernetes, str(path)]
    done = subprocess.run([command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


OPERATORS = ("keda.sh", "monitoring.coreos.com")


def test_operators_know_what_is_made_for_them() -> None:
    kinds = validate_operators(render(*ALL_ON))
    assert sorted(kinds) == [
        "PrometheusRule",
        "ScaledObject",
        "ServiceMonitor",
        "ServiceMonitor",
        "TriggerAuthentication",
    ]


def test_operators_refuse_what_they_do_not_know() -> None:
    (scaler,) = [item for item in render(*ALL_ON) if item["kind"] == "ScaledObject"]
    scaler["spec"]["maxReplicaCount"] = "many"
    with pytest.raises(AssertionError, match="maxReplicaCount must be integer"):
        validate_operators([scaler])


def test_names_are_unique_and_fit_where_the_release_has_a_long_name() -> None:
    done = helm(4, "template", "r" * 53, str(CHART), "--namespace", NAMESPACE, *ALL_ON)
    objects = [item for item in yaml.safe_load_all(done.stdout) if item]
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names)) > 10
    assert max(len(name) for _, name in names) <= 63
    # A label of its pods has the name and 11 characters more: they would not be made.
    assert max(len(name) for kind, name in names if kind == "StatefulSet") <= 52


def test_a_release_called_nibble_is_not_named_twice() -> None:
    done = helm(4, "template", "nibble", str(CHART))
    assert "name: nibble-gateway" in done.stdout
    assert "nibble-nibble" not in done.stdout


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("worker.devise=cpu", "devise"),
        ("worker.device=tpu", "device"),
        ("gateway.replicas=many", "replicas"),
        ("gateway.settings.NIBBLE_KEEP_ALIVE=3", "NIBBLE_KEEP_ALIVE"),
        ("gateway.settings.NIBBLE_NUM_THREADS=3", "NIBBLE_NUM_THREADS"),
        ("worker.settings.NIBBLE_REDIS_URL=redis://x", "NIBBLE_REDIS_URL"),
        ("images.gateway=nibble-gateway", "gateway"),
        ("model.volume.kind=hostPath", "kind"),
        ("gateway.service.port=70000", "port"),
        ("redis.external.password=secret", "password"),
        ("worker.resources.limit.memory=1Gi", "limit"),
        ("images.pullSecrets[0].nmae=registry", "nmae"),
        ("worker.tolerations[0].kay=nvidia.com/gpu", "kay"),
        ("gateway.affinity.podAntiAfinity=x", "podAntiAfinity"),
        ("networkPolicy.clients[0].matchLabels.team=web", "matchLabels"),
        ("tracing.endpoint=collector:4318", "endpoint"),
        ("tracing.environment.NIBBLE_TRACING=true", "NIBBLE_TRACING"),
        ("tracing.environment.OTEL_EXPORTER_OTLP_HEADERS=secret", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("tracing.environment.OTEL_TRACES_SAMPLER=always_on", "tracing.endpoint"),
        ("gateway.apiKeys.fileKey=f", "existingSecret"),
    ],
)
def test_values_that_mean_nothing_are_refused(value: str, complaint: str) -> None:
    assert complaint in refusal("--set", value)
