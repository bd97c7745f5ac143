"""A Kubernetes cluster of one node on this machine, of the programs in a directory; for tests of the chart.

The kubelet of Kubernetes up to 1.23 starts containers with Docker itself, so that no registry is needed: it has the
images that were built here. Pods are on a bridge (CNI), Services are kube-proxy's iptables, names are answered by ours
(cluster_names.py). Nothing enforces network policies. The API server listens on 127.0.0.1; its token is no secret.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster_names import NameServer
from docker_commands import docker, wait_until

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
PLUGINS = ("bridge", "host-local", "loopback", "firewall")
NODE = "localhost"  # a name that the API server finds the kubelet by
PODS = "10.244.0.0/24"
SERVICES = "10.96.0.0/16"
GATEWAY = "10.244.0.1"  # the node, on the bridge
BRIDGE = "nibble-cni0"
API = "https://127.0.0.1:16443"
TOKEN = "nibble-test"
INFRA_IMAGE = "nibble-stand-in/pause:1"
START_S = 120.0
CHAINS = ("KUBE-", "CNI-")


class Cluster:
    """kubectl and helm, as somebody who may do everything."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self.binaries = binaries
        self.directory = directory
        self.environment = {**os.environ, "KUBECONFIG": str(directory / "kubeconfig"), "HOME": str(directory)}

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        return self.run(str(self.binaries / "kubectl"), *arguments, stdin=stdin, check=check)

    def run(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        """Its standard output."""
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, env=self.environment, timeout=900
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Objects of a kind."""
        return list(json.loads(self.kubectl("get", "-o", "json", *arguments))["items"])


@contextlib.contextmanager
def running_cluster(binaries: Path, directory: Path) -> Iterator[Cluster]:
    """Needs root and a Docker daemon. What it adds to the machine's network is taken away again."""
    assert os.geteuid() == 0, "a node of a cluster has to be root"
    assert not _rules_of_clusters(), "this machine's network has a cluster's rules already"
    _make_infra_image()
    cluster = Cluster(binaries, directory)
    _configure(directory)
    processes: list[subprocess.Popen[bytes]] = []
    names = NameServer(GATEWAY, API, TOKEN)
    try:
        for name, arguments in _control_plane(directory).items():
            processes.append(_start(binaries / name, arguments, directory))
            if name == "kube-apiserver":
                wait_until(lambda: cluster.kubectl("get", "--raw", "/readyz", check=False) == "ok", START_S, str)
        _make_bridge()
        names.start()
        for name, arguments in _node(directory, binaries).items():
            processes.append(_start(binaries / name, arguments, directory))
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", f"--timeout={START_S}s", check=False)
        wait_until(lambda: _is_ready(cluster), START_S, lambda: cluster.kubectl("describe", "nodes"))
        yield cluster
    finally:
        for process in reversed(processes):
            _end(process)
        names.stop()
        _remove_containers()
        _clean_network()
        _unmount(directory)


def _is_ready(cluster: Cluster) -> bool:
    """The node is, and what every pod needs is there."""
    conditions = [condition for node in cluster.get("nodes") for condition in node["status"]["conditions"]]
    is_node_ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return is_node_ready and bool(cluster.get("serviceaccounts", "--namespace", "default"))


def _make_infra_image() -> None:
    """Of the container that holds a pod's network."""
    code = "import signal as s; e = {s.SIGTERM, s.SIGINT}; s.pthread_sigmask(s.SIG_BLOCK, e); s.sigwait(e)"
    command = json.dumps(["python", "-c", code])
    file = f"FROM nibble-gateway\nUSER 65535\nHEALTHCHECK NONE\nENTRYPOINT {command}\n"
    done = subprocess.run(
        ["docker", "build", "--tag", INFRA_IMAGE, "-"], input=file, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _configure(directory: Path) -> None:
    """What the processes read."""
    cluster = {"server": API, "insecure-skip-tls-verify": True}
    configuration = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    }
    (directory / "kubeconfig").write_text(json.dumps(configuration))
    (directory / "tokens").write_text(f"{TOKEN},admin,admin,system:masters\n")
    key = directory / "accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(directory / "addresses"),
            "ranges": [[{"subnet": PODS, "gateway": GATEWAY}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    networks = directory / "networks"
    networks.mkdir()
    plugins = {"cniVersion": "0.4.0", "name": "nibble-test", "plugins": [bridge, {"type": "firewall"}]}
    (networks / "10-nibble-test.conflist").write_text(json.dumps(plugins))


def _control_plane(directory: Path) -> dict[str, list[str]]:
    """Arguments by program, in the order in which they start."""
    etcd = "http://127.0.0.1:12379"
    key, kubeconfig = directory / "accounts.key", f"--kubeconfig={directory}/kubeconfig"
    alone = ["--leader-elect=false", "--bind-address=127.0.0.1", "--port=0"]
    return {
        "etcd": [
            *(f"--data-dir={directory}/etcd", "--unsafe-no-fsync", f"--listen-client-urls={etcd}"),
            *(f"--advertise-client-urls={etcd}", "--listen-peer-urls=http://127.0.0.1:12380"),
        ],
        "kube-apiserver": [
            *(f"--etcd-servers={etcd}", f"--service-cluster-ip-range={SERVICES}", "--allow-privileged=true"),
            *("--bind-address=127.0.0.1", "--secure-port=16443", f"--cert-dir={directory}/certificates"),
            *(f"--token-auth-file={directory}/tokens", "--authorization-mode=RBAC", "--anonymous-auth=false"),
            *("--service-account-issuer=https://nibble.test", f"--service-account-key-file={key}"),
            *(f"--service-account-signing-key-file={key}", "--endpoint-reconciler-type=none"),
            "--kubelet-preferred-address-types=Hostname",
        ],
        "kube-controller-manager": [kubeconfig, f"--service-account-private-key-file={key}", *alone],
        "kube-scheduler": [kubeconfig, *alone],
    }


def _node(directory: Path, binaries: Path) -> dict[str, list[str]]:
    kubeconfig = f"--kubeconfig={directory}/kubeconfig"
    return {
        "kubelet": [
            *(kubeconfig, f"--hostname-override={NODE}", f"--root-dir={directory}/kubelet", "--address=127.0.0.1"),
            *(f"--cert-dir={directory}/kubelet-certificates", "--authorization-mode=AlwaysAllow", "--read-only-port=0"),
            *("--container-runtime=docker", f"--pod-infra-container-image={INFRA_IMAGE}", "--cgroup-driver=cgroupfs"),
            *("--network-plugin=cni", f"--cni-bin-dir={binaries}/cni", f"--cni-conf-dir={directory}/networks"),
            *(f"--cluster-dns={GATEWAY}", "--cluster-domain=cluster.local", "--fail-swap-on=false"),
            # This node is no host of its own: others use its memory and disk too, and its images stay.
            *("--cgroups-per-qos=false", "--enforce-node-allocatable=", "--eviction-hard="),
            *("--image-gc-high-threshold=100", "--minimum-image-ttl-duration=240h"),
        ],
        "kube-proxy": [
            *(kubeconfig, f"--hostname-override={NODE}", "--proxy-mode=iptables", f"--cluster-cidr={PODS}"),
            *(
                "--conntrack-max-per-core=0",
                "--healthz-bind-address=127.0.0.1:10256",
                "--metrics-bind-address=127.0.0.1:10249",
            ),
        ],
    }


def _start(program: Path, arguments: list[str], directory: Path) -> subprocess.Popen[bytes]:
    with (directory / f"{program.name}.log").open("wb") as log:
        return subprocess.Popen([program, *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=directory)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The API server waits for all who watch something."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _make_bridge() -> None:
    """As the plugin would for the first pod: the server of names has to listen on it before."""
    for command in (
        ["link", "add", BRIDGE, "type", "bridge"],
        ["addr", "add", f"{GATEWAY}/24", "dev", BRIDGE],
        ["link", "set", BRIDGE, "up"],
    ):
        subprocess.run(["ip", *command], check=True)


def _remove_containers() -> None:
    """Of pods that a failed test has left."""
    if left := docker("ps", "--all", "--quiet", "--filter", "label=io.kubernetes.pod.name").split():
        docker("rm", "--force", *left)


def _rules_of_clusters() -> str:
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in rules.splitlines() if any(chain in line for chain in CHAINS))


def _clean_network() -> None:
    rules = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    kept = [line for line in rules.splitlines() if not any(chain in line for chain in CHAINS)]
    subprocess.run(["iptables-restore"], input="\n".join([*kept, ""]), text=True, check=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def _unmount(directory: Path) -> None:
    """Volumes in memory that the kubelet has left."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split()[1].startswith(str(directory)):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
    shutil.rmtree(directory / "kubelet", ignore_errors=True)
