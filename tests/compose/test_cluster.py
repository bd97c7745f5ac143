"""The chart in a cluster with real pods: answers, lost and moved pods, upgrade, rollback, removal.

KUBERNETES names a directory with the programs of a cluster (see cluster.py); without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from cluster import PLUGINS, PROGRAMS, Cluster, running_cluster
from cluster_release import Release, Traffic
from docker_commands import ROOT, docker, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

KUBERNETES = os.environ.get("KUBERNETES", "")
CHART = ROOT / "helm" / "nibble"
HELM = ROOT / "build" / "helm" / "v34" / "helm" / "helm"
TRIAL = ("-f", str(CHART / "examples" / "cpu-trial.yaml"))
# Each start of a worker would compile them anew, for a minute or for many on a busy machine.
KERNELS = ("--set", "worker.kernelCache.existingClaim=kernels")


@pytest.fixture(scope="module")
def cluster(build: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not KUBERNETES:
        pytest.skip("KUBERNETES does not say where the programs of a cluster are")
    binaries = Path(KUBERNETES)
    missing = [name for name in (*PROGRAMS, *(f"cni/{plugin}" for plugin in PLUGINS)) if not (binaries / name).exists()]
    assert not missing, f"not in {binaries}: {missing}"
    for target in ("gateway", "worker-cpu"):
        docker("tag", build(target), f"nibble-{target}:0.1.0")
    with running_cluster(binaries, tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def chart(cluster: Cluster) -> Path:
    """As it is shipped, in older API versions: it asks for 1.25, and kubelets run containers by Docker up to 1.23."""
    copy = cluster.directory / "chart"
    shutil.copytree(CHART, copy)
    for path in [*copy.glob("templates/*.yaml"), copy / "Chart.yaml"]:
        text = path.read_text().replace("policy/v1\n", "policy/v1beta1\n").replace(">=1.25.0-0", ">=1.20.0-0")
        path.write_text(text.replace("autoscaling/v2\n", "autoscaling/v2beta2\n"))
    return copy


@pytest.fixture(scope="module")
def release(cluster: Cluster, chart: Path) -> Iterator[Release]:
    release = Release(cluster, HELM, chart, "trial", (*TRIAL, *KERNELS))
    share_kernels(release, cluster.directory)
    release.install()
    yield release
    if release.is_there():
        release.uninstall()


@pytest.fixture(scope="module")
def answer(release: Release) -> str:
    """What is said where nothing happens."""
    return release.answer()


def test_the_trial_is_ready_and_answers(release: Release, answer: str) -> None:
    pods = release.pods()
    assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods} == {"gateway", "worker", "redis"}
    for pod in pods:
        assert all(status["ready"] for status in pod["status"]["containerStatuses"])
    assert [status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]] == [0, 0, 0]
    assert len(answer) > 100


def test_the_test_of_the_release_passes(release: Release) -> None:
    assert "Succeeded" in release.helm("test", release.name, "--logs")


def test_containers_write_to_their_volumes_alone(release: Release) -> None:
    user = {"gateway": "10001", "worker": "10001", "redis": "999"}
    for component, number in user.items():
        name = release.pod(component)
        assert release.kubectl("exec", name, "--", "id", "-u") == number
        said = release.kubectl("exec", name, "--", "sh", "-c", "touch /x /opt/x 2>&1 || true")
        assert said.count("Read-only file system") == 2


def test_killed_worker_loses_no_token(release: Release, answer: str) -> None:
    """The only one: its container is started again, and goes on."""
    worker = release.pod("worker")
    assert release.answer(lambda: docker("kill", release.container(worker, "worker"))) == answer
    assert release.restarts(worker) == 1
    release.wait()


def test_deleted_worker_hands_its_request_on(release: Release, answer: str) -> None:
    release.upgrade("--set", "worker.replicas=2")
    busy = []

    def delete() -> None:
        busy.append(release.busy_worker())
        release.kubectl("delete", "pod", busy[0], "--wait=false")

    assert release.answer(delete) == answer
    release.wait()
    assert busy[0] not in release.names("worker")
    release.upgrade()


def test_deleted_gateway_ends_the_answer_it_has_begun_and_goes(release: Release, answer: str) -> None:
    """An eviction, as `kubectl drain` asks for; another one is ready before it was said to be gone."""
    gateway = release.pod("gateway")
    container = release.container(gateway, "gateway")
    ended: list[tuple[str, float]] = []

    def evict() -> None:
        eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": gateway}}
        path = f"/api/v1/namespaces/{release.namespace}/pods/{gateway}/eviction"
        release.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
        threading.Thread(target=lambda: ended.append((docker("wait", container), time.monotonic()))).start()

    started = time.monotonic()
    assert release.answer(evict) == answer
    wait_until(lambda: bool(ended), 45, lambda: f"{gateway} has not ended")
    code, at = ended[0]
    assert code == "0"
    assert at - started < 45, "preStop, drain and 10 s"
    release.wait()


def test_an_upgrade_and_a_rollback_lose_nothing(release: Release, answer: str) -> None:
    """Of what goes on all the time: by new connections, and by one that is kept."""
    with Traffic(release) as traffic:
        release.upgrade("--set", "logLevel=DEBUG")
        assert release.variable("gateway", "NIBBLE_LOG_LEVEL") == "DEBUG"
        release.helm("rollback", release.name, "1", "--wait", "--timeout", "10m")
        assert release.variable("gateway", "NIBBLE_LOG_LEVEL") == "INFO"
        release.wait()
    assert not traffic.errors, "\n".join(traffic.errors[:20])
    assert len(traffic.answers) > 4
    assert set(traffic.answers) == {answer}


def test_a_removed_release_leaves_nothing(release: Release) -> None:
    release.uninstall()
    assert release.left() == []


@pytest.fixture(scope="module")
def kept(cluster: Cluster, chart: Path) -> Iterator[Release]:
    """With volumes, of which each belongs to root at first, API keys and a password."""
    values = (
        *(*TRIAL, *KERNELS, "--set", "redis.bundled.persistence.enabled=true"),
        *("--set", "redis.bundled.persistence.storageClass=data", "--set", "redis.auth.existingSecret=redis"),
        *("--set", "model.volume.kind=claim", "--set", "model.volume.storageClass=models"),
        *("--set", "gateway.apiKeys.existingSecret=keys", "--set", "gateway.replicas=2"),
    )
    release = Release(cluster, HELM, chart, "kept", values, key="first")
    for secret in ("keys --from-literal=keys=first,second", "redis --from-literal=password=pass"):
        release.kubectl("create", "secret", "generic", *secret.split())
    for name in ("data", "models"):
        release.kubectl("apply", "-f", "-", stdin=json.dumps(local_volume(name, name, cluster.directory / name)))
    share_kernels(release, cluster.directory)
    release.install()
    yield release
    if release.is_there():
        release.uninstall()


def share_kernels(release: Release, directory: Path) -> None:
    """A claim in each release's namespace, on one directory."""
    storage = f"kernels-{release.name}"
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "kernels"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": storage,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    for item in (local_volume(storage, storage, directory / "kernels"), claim):
        release.kubectl("apply", "-f", "-", stdin=json.dumps(item))


def local_volume(name: str, storage: str, path: Path) -> dict[str, Any]:
    """A directory of the node, which is root's."""
    path.mkdir(exist_ok=True)
    node = {"key": "kubernetes.io/hostname", "operator": "Exists"}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "20Gi"},
            "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
            "storageClassName": storage,
            "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
        },
    }


def test_with_volumes_keys_and_a_password_it_answers(kept: Release) -> None:
    assert "Succeeded" in kept.helm("test", kept.name, "--logs")
    with pytest.raises(openai.AuthenticationError):
        kept.client("none").models.list()
    prepared = [kept.kubectl("logs", name, "-c", "model") for name in (*kept.names("gateway"), *kept.names("worker"))]
    assert len(prepared) == 3


def test_a_moved_redis_keeps_what_runs(kept: Release) -> None:
    whole = kept.answer()
    assert kept.answer(lambda: kept.kubectl("delete", "pod", kept.pod("redis"), "--wait=false")) == whole
    kept.wait()
    restored = "nibble_restored_requests_total"
    assert sum(kept.metric(name, 8000, restored) for name in kept.names("gateway")) == 0


def test_of_a_removed_release_the_data_of_redis_stay(kept: Release) -> None:
    kept.uninstall()
    assert kept.left() == ["persistentvolumeclaim/data-kept-nibble-redis-0"]
