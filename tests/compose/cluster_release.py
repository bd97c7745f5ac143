"""A release of the chart in a cluster, as helm, kubectl and clients of the service see it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import openai
from cluster import Cluster
from docker_commands import docker, wait_until

TOKENS = 160
PROMPT = "Tell a long story about a lighthouse keeper and a storm."
WAIT = ("--wait", "--timeout", "10m")
KINDS = "all,configmap,secret,pvc,networkpolicy,ingress,pdb,hpa,serviceaccount"


class Release:
    """In a namespace of its own name."""

    def __init__(
        self, cluster: Cluster, helm: Path, chart: Path, name: str, values: tuple[str, ...], key: str = "none"
    ) -> None:
        self.name = self.namespace = name
        self._cluster = cluster
        self._helm = str(helm)
        self._chart = str(chart)
        self._values = values
        self._key = key
        cluster.kubectl("create", "namespace", name)
        self._before = self._objects()

    def helm(self, *arguments: str) -> str:
        return self._cluster.run(self._helm, "--namespace", self.namespace, *arguments)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    def install(self) -> None:
        self._before = self._objects()
        self.helm("install", self.name, self._chart, *self._values, *WAIT)

    def upgrade(self, *more: str) -> None:
        self.helm("upgrade", self.name, self._chart, *self._values, *more, *WAIT)
        self.wait()

    def uninstall(self) -> None:
        self.helm("uninstall", self.name, *WAIT)
        wait_until(lambda: not self.pods(), 120, self.pods)

    def is_there(self) -> bool:
        return self.name in json.dumps(json.loads(self.helm("list", "--output", "json")))

    def left(self) -> list[str]:
        """Objects that were not there before it was installed."""
        return sorted(set(self._objects()) - set(self._before))

    def _objects(self) -> list[str]:
        lines = self.kubectl("get", KINDS, "--output", "name", "--ignore-not-found").splitlines()
        return [line.replace(".apps", "").replace(".policy", "") for line in lines]

    def wait(self) -> None:
        """Until every pod is ready, and none is on its way out."""

        def is_settled() -> bool:
            pods = self.pods()
            statuses = [status for pod in pods for status in pod["status"].get("containerStatuses", [{"ready": False}])]
            leaving = [pod for pod in pods if "deletionTimestamp" in pod["metadata"]]
            return not leaving and all(status["ready"] for status in statuses)

        wait_until(is_settled, 300, lambda: self.kubectl("describe", "pods"))

    def pods(self) -> list[dict[str, Any]]:
        labels = f"app.kubernetes.io/instance={self.name},app.kubernetes.io/component!=test"
        return self._cluster.get("pods", "--namespace", self.namespace, "--selector", labels)

    def names(self, component: str) -> list[str]:
        pods = self.pods()
        found = [pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/component"] == component]
        return [pod["metadata"]["name"] for pod in found]

    def pod(self, component: str) -> str:
        """The only one."""
        (name,) = self.names(component)
        return name

    def container(self, pod: str, name: str) -> str:
        """Docker's id of it."""
        labels = [f"label=io.kubernetes.pod.name={pod}", f"label=io.kubernetes.container.name={name}"]
        return docker("ps", "--quiet", *(part for label in labels for part in ("--filter", label)))

    def restarts(self, pod: str) -> int:
        (found,) = [each for each in self.pods() if each["metadata"]["name"] == pod]
        return sum(status["restartCount"] for status in found["status"]["containerStatuses"])

    def variable(self, component: str, name: str) -> str:
        """Of the process in the only pod that stays."""
        (pod,) = [
            each["metadata"]["name"]
            for each in self.pods()
            if each["metadata"]["labels"]["app.kubernetes.io/component"] == component
            and "deletionTimestamp" not in each["metadata"]
        ]
        return self.kubectl("exec", pod, "-c", component, "--", "printenv", name)

    def metric(self, pod: str, port: int, name: str) -> float:
        """The sum over its labels."""
        code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/metrics').read().decode())"
        lines = self.kubectl("exec", pod, "--", "python", "-c", code).splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0] == name)

    def busy_worker(self) -> str:
        (name,) = [name for name in self.names("worker") if self.metric(name, 8001, "nibble_running_sequences")]
        return name

    def client(self, key: str = "") -> openai.OpenAI:
        """Of its Service: this machine is a node of the cluster."""
        address = self.kubectl("get", "service", f"{self.name}-nibble", "--output", "jsonpath={.spec.clusterIP}")
        return openai.OpenAI(base_url=f"http://{address}/v1", api_key=key or self._key, max_retries=0, timeout=300)

    def answer(self, break_it: Callable[[], object] | None = None, client: openai.OpenAI | None = None) -> str:
        """The one that greedy decoding gives; something may be broken after the tenth piece of its stream."""
        chunks = (client or self.client()).chat.completions.create(
            model="SmolLM2-135M-Instruct",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        pieces = []
        for chunk in chunks:
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == TOKENS
            pieces.extend(choice.delta.content or "" for choice in chunk.choices)
            if len(pieces) == 10 and break_it is not None:
                break_it()
                break_it = None
        assert break_it is None
        return "".join(pieces)


class Traffic:
    """Answers one after the other, until the context ends, of two clients: one connects anew for each."""

    def __init__(self, release: Release) -> None:
        self.answers: list[str] = []
        self.errors: list[str] = []
        self._release = release
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(kept,)) for kept in (None, release.client())]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, kept: openai.OpenAI | None) -> None:
        while not self._is_over.is_set():
            try:
                self.answers.append(self._release.answer(client=kept))
            except (openai.OpenAIError, AssertionError) as error:
                when = time.strftime("%X")  # as in logs of the cluster
                self.errors.append(f"{when} {'kept' if kept else 'new'}: {error!r}, {error.__cause__!r}")
                self._is_over.wait(1)
