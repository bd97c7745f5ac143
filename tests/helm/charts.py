"""Renders the chart with the helm binaries that `make test-helm` fetched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "nibble"
TOOLS = ROOT / "build" / "helm"  # of `make test-helm`
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
KEDA = ("-f", str(CHART / "examples" / "keda.yaml"))  # nearly all that there is
EXTERNAL = ("-f", str(CHART / "examples" / "external-redis.yaml"))
RELEASE, NAMESPACE = "chat", "models"

# helm by its major version, as two npm packages carry it.
HELMS = {3: TOOLS / "v32" / "helm" / "helm", 4: TOOLS / "v34" / "helm" / "helm"}
Object = dict[str, Any]


def helm(version: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELMS[version]), *arguments], capture_output=True, text=True, check=False)


def render(*arguments: str, version: int = 4) -> list[Object]:
    """All objects, with `--set` and `-f` options."""
    done = helm(version, "template", RELEASE, str(CHART), "--namespace", NAMESPACE, *arguments)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def refusal(*arguments: str) -> str:
    """What is said of values that the schema does not allow."""
    done = helm(4, "template", RELEASE, str(CHART), *arguments)
    assert done.returncode != 0
    return done.stderr


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only one of this kind whose name ends so."""
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"].endswith(name)]
    return found


def pod(workload: Object) -> Object:
    if workload["kind"] == "Pod":
        return dict(workload["spec"])
    return dict(workload["spec"]["template"]["spec"])


def container(workload: Object) -> Object:
    (found,) = pod(workload)["containers"]
    return dict(found)


def environment(workload: Object) -> dict[str, Any]:
    """Value, or where it comes from, by name; a name that is given twice fails."""
    entries = container(workload)["env"]
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def workloads(objects: list[Object]) -> list[Object]:
    return [item for item in objects if item["kind"] in ("Deployment", "StatefulSet", "Pod")]


def validate_operators(objects: list[Object]) -> list[str]:
    """Kinds of the validated objects of operators."""
    script = Path(__file__).with_name("validate_operators.mjs")
    done = subprocess.run(
        ["node", str(script), str(TOOLS)], input=json.dumps(objects), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))
